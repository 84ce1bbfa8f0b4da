"""Command 2's one job: delta tables -> densities -> a recipe that mergekit runs, proven and published."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.frames import Measurements, delta_file, read_measurements
from utils.method_rules import DensityMethod, check_global_parameters, density_method
from utils.naming import Naming, name_tensors, open_local_models
from utils.pair_config import ModelEntry, PairConfig
from utils.plots import require_matplotlib
from utils.provenance import changed_checkpoints, compare_with_manifest
from utils.publish import locked_folder, prepare_folder, publish_files
from utils.recipe import RecipeSettings, check_file_names, recipe, recipe_bytes, recipe_name, weights_cancel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DecideOptions:
    """What command 2 was asked to do."""

    config: PairConfig
    delta_dfs_in_dir: Path
    out_dir: Path
    gamma: float
    epsilon: float
    merge_method: str
    apply_lewis_to_weights: bool = False
    bound: str = "minmax"
    mean_density: float | None = None
    control: str | None = None
    lambda_: float | None = None
    out_dtype: str | None = None
    plot: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The experts to merge, in the order of `target_model_names`."""
        by_type = {entry.type: entry for entry in self.config.experts}
        return tuple(by_type[name] for name in self.config.target_model_names)

    @property
    def tags(self) -> tuple[str, ...]:
        """What the recipe's file name says beside the released code's parts."""
        clip = ("clip",) if self.bound == "clip" else ()
        mean = () if self.mean_density is None else (f"mean{self.mean_density}",)
        return (*clip, *mean)


def decide(options: DecideOptions) -> None:
    """Check, compute, prove and publish; print what was decided.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    from utils import decision_report as report

    method = _check_options(options)
    guided, uniform, pictures = _file_names(options)
    measured = _measurements(options)
    warnings = [*measured.warnings, *compare_with_manifest(options.config, options.experts, measured.manifest)]
    report.say_choices(options, method, measured)
    local = open_local_models(options.config, options.experts)
    warnings += changed_checkpoints(measured.manifest, local)
    naming = name_tensors(options.config, measured, local, trust_remote_code=options.trust_remote_code)
    table, control = _coefficients(options, measured, naming)
    settings = _settings(options, method)
    recipes = {guided: table} if control is None else {guided: table, uniform: control}
    files = {name: recipe_bytes(recipe(rows, naming.filters, settings)) for name, rows in recipes.items()}
    if options.plot:
        drawn = report.heatmaps(options, table)
        files |= {name: drawn[model_type] for model_type, name in pictures.items()}
    if weights_cancel(settings):
        warnings.append(_WEIGHTS_CANCEL)
    report.warn([*warnings, *naming.warnings])
    written = publish_changed(options.out_dir, files, overwrite=options.overwrite)
    report.say_result(options, table, control, naming)
    report.say_files(options, list(recipes), list(files), written)


_WEIGHTS_CANCEL = (
    "--apply_lewis_to_weights has no effect here: with one expert and normalize: true the merge divides each delta by "
    "the very weight it was multiplied with; set normalize: false in global_parameters"
)


def publish_changed(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> list[str]:
    """Write the files that are not already there with these very bytes; return the names written.

    Raises:
        UserError: a file of that name holds something else and `overwrite` is false; nothing is written then.
    """
    with locked_folder(folder):
        changed = {name: content for name, content in files.items() if not _holds(folder / name, content)}
        publish_files(folder, changed, overwrite=overwrite)
    return list(changed)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _check_options(options: DecideOptions) -> DensityMethod:
    method = density_method(options.merge_method)
    if options.gamma > options.epsilon:
        raise UserError(
            f"--gamma {options.gamma} is above --epsilon {options.epsilon}: gamma is the density of what changed "
            "least, epsilon of what changed most; swap them"
        )
    check_global_parameters(method, options.config.global_parameters, f"pair config {options.config.path}")
    if options.plot:
        require_matplotlib("--plot")
    prepare_folder(options.out_dir, "--out_dir")
    return method


def _file_names(options: DecideOptions) -> tuple[str, str, dict[str, str]]:
    """The names of the guided recipe, of its uniform control, and of each expert's heatmap by type."""
    parts = (options.config.path, options.gamma, options.epsilon, options.merge_method)
    guided = recipe_name(*parts, options.tags)
    uniform = recipe_name(*parts, (*options.tags, "uniform"))
    stem = guided.removesuffix(".yaml")
    pictures = {entry.type: f"{stem}_{entry.type}_density.png" for entry in options.experts}
    check_file_names([guided, uniform, *(pictures.values() if options.plot else ())], options.config.path)
    return guided, uniform, pictures


def _measurements(options: DecideOptions) -> Measurements:
    config, folder = options.config, options.delta_dfs_in_dir
    merged = [entry.type for entry in options.experts]
    # A table of an expert that the config measures but does not merge may lie there; it is checked and left out.
    spare = [
        entry.type
        for entry in config.experts
        if entry.type not in merged and (folder / delta_file(entry.type)).exists()
    ]
    measured = read_measurements(folder, [*merged, *spare], config.base_model_type, config.components)
    first = measured.deltas[merged[0]]
    for model_type in merged[1:]:
        if set(measured.deltas[model_type].columns) != set(first.columns):
            raise UserError(
                f"dataframe folder {folder}: {delta_file(merged[0])} and {delta_file(model_type)} hold different "
                "components; measure both experts with the same config"
            )
    return measured


def _settings(options: DecideOptions, method: DensityMethod) -> RecipeSettings:
    return RecipeSettings(
        method=method,
        base=options.config.base,
        experts=options.experts,
        parameters=options.config.global_parameters,
        as_weights=options.apply_lewis_to_weights,
        lambda_=options.lambda_,
        out_dtype=options.out_dtype,
    )


def _coefficients(
    options: DecideOptions, measured: Measurements, naming: Naming
) -> "tuple[pd.DataFrame, pd.DataFrame | None]":
    """The guided table, and its uniform control if asked for."""
    import pandas as pd

    from utils.coefficients import coefficient_table, uniform_control, with_mean_density
    from utils.guidance.lewis import densities

    as_weights = options.apply_lewis_to_weights
    columns = list(measured.deltas[options.experts[0].type].columns)
    parts = []
    for entry in options.experts:
        density = densities(measured.deltas[entry.type][columns], options.gamma, options.epsilon, options.bound)
        parts.append(coefficient_table(entry.type, density, naming.tensors, naming.params, as_weights=as_weights))
    table = pd.concat(parts, ignore_index=True)
    if options.mean_density is not None:
        table = with_mean_density(table, options.mean_density, as_weights=as_weights)
    return table, uniform_control(table) if options.control else None
