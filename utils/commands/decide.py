"""Command 2's one job: what was measured -> densities or weights -> a recipe that mergekit runs, proven and published."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands import decide_report as report
from utils.commands.options import DecideOptions, Result
from utils.commands.provenance import changed_checkpoints, compare_with_manifest
from utils.errors import UserError
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.folder import check_folder, hash_warnings, read_manifest
from utils.guidance.method import DEFAULT
from utils.plots import require_matplotlib
from utils.publish import locked_folder, prepare_folder, publish_files
from utils.recipes.coefficients import control_table
from utils.recipes.method_rules import (
    OWN_METHODS,
    DeltaMethod,
    check_global_parameters,
    counterpart,
    density_method,
    known_parameters,
    weight_method,
)
from utils.recipes.naming import open_local_models
from utils.recipes.recipe import RecipeSettings, check_file_names, recipe, recipe_bytes, recipe_name, weights_cancel

if TYPE_CHECKING:
    pass

_USUAL_DENSITY = 0.5  # of guidance that gives weights, with a method that needs a density


def decide(options: DecideOptions) -> tuple[str, ...]:
    """Check, compute, prove and publish; print what was decided.

    Returns:
        The file names of the recipes in `out_dir`, the guided one first.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    rule = _check_options(options)
    manifest = read_manifest(options.delta_dfs_in_dir) if options.delta_dfs_in_dir.is_dir() else None
    check_folder(options.delta_dfs_in_dir, manifest, options.method.name)
    warnings = compare_with_manifest(options.config, options.experts, manifest)
    warnings += hash_warnings(options.delta_dfs_in_dir, manifest, options.method.files(options.config))
    local = open_local_models(options.config, options.experts)
    warnings += changed_checkpoints(manifest, local)
    job = DecideJob(
        config=options.config,
        experts=options.experts,
        folder=options.delta_dfs_in_dir,
        manifest=manifest,
        local=local,
        merge_method=options.merge_method,
        options=options.method_options,
        mean_density=_density(options, rule),
        trust_remote_code=options.trust_remote_code,
    )
    decision = options.method.decide(job)
    settings = _settings(options, rule, decision)
    report.say_choices(options, settings, decision, manifest)
    result = _result(options, decision, settings)
    if weights_cancel(settings):
        warnings.append(_WEIGHTS_CANCEL.format(what="weights"))
    elif options.control == "lines" and weights_cancel(replace(settings, as_weights=True)):
        warnings.append(_WEIGHTS_CANCEL.format(what="the control's weights"))
    report.warn([*warnings, *decision.warnings, *decision.naming.warnings])
    written = publish_changed(options.out_dir, result.files, overwrite=options.overwrite)
    report.say_result(options, settings, result)
    report.say_files(options, result.recipes, list(result.files), written)
    return result.recipes


_WEIGHTS_CANCEL = (
    "{what} have no effect here: with one expert and normalize: true the merge divides each delta by the very weight it "
    "was multiplied with; set normalize: false in global_parameters"
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


def _check_options(options: DecideOptions) -> DeltaMethod:
    rule = _rule(options)
    if options.mean_density is not None and not rule.keeps:
        raise UserError(
            f"--mean_density {options.mean_density} has no effect with --merge_method {rule.name}, which adds whole "
            "deltas; leave it out, or use ties, dare_ties or dare_linear"
        )
    options.method.check_experts(options.config, len(options.experts))
    check_global_parameters(rule, _parameters(options, rule), f"pair config {options.config.path}")
    if options.plot and rule.whole and options.mean_density is None:
        raise UserError(f"--plot has no densities to draw: {rule.name} keeps whole deltas without --mean_density")
    if options.plot:
        require_matplotlib("--plot")
    prepare_folder(options.out_dir, "--out_dir")
    return rule


def _rule(options: DecideOptions) -> DeltaMethod:
    if options.merge_method in options.method.own_merge_methods:
        return OWN_METHODS[options.merge_method]
    if options.method.gives == "weights":
        return weight_method(options.merge_method)
    return density_method(options.merge_method, options.method.own_merge_methods)


def _parameters(options: DecideOptions, rule: DeltaMethod) -> dict[str, Any]:
    """The config's `global_parameters`; weights are never divided by their sum, which would undo them.

    What only mergekit's methods know is left out for one of this project's.
    """
    parameters = dict(options.config.global_parameters)
    if options.method.gives == "weights":
        for name in ("density", "weight"):  # in a config that was made for another kind of guidance
            parameters.pop(name, None)
        parameters["normalize"] = False
    return parameters if rule.name not in OWN_METHODS else known_parameters(rule, parameters)


def _density(options: DecideOptions, rule: DeltaMethod) -> float | None:
    if options.mean_density is None and options.method.gives == "weights" and rule.keeps:
        return _USUAL_DENSITY
    return options.mean_density


def _settings(options: DecideOptions, rule: DeltaMethod, decision: Decision) -> RecipeSettings:
    if decision.merge_method is not None:
        rule = OWN_METHODS[decision.merge_method]
    parameters = _parameters(options, rule) | decision.parameters
    if rule.whole and options.mean_density is None:
        rule = replace(rule, keeps="")
    return RecipeSettings(
        method=rule,
        base=options.config.base,
        experts=options.experts,
        parameters=parameters,
        as_weights=decision.writes_weights,
        lambda_=options.lambda_ if options.lambda_ is not None else _usual_lambda(parameters, decision),
        out_dtype=options.out_dtype,
    )


def _control_settings(options: DecideOptions, settings: RecipeSettings) -> RecipeSettings:
    """Those of the unguided recipe: for a method of this project's, mergekit's that does the same without vectors."""
    plain = replace(settings, as_weights=settings.as_weights or options.control == "lines")
    method = counterpart(settings.method, options.merge_method)
    if method is settings.method:
        return plain
    parameters = dict(options.config.global_parameters)
    if settings.method.whole:  # a mean of deltas
        parameters = {name: value for name, value in parameters.items() if name == "lambda"} | {"normalize": False}
        parameters |= {method.extra: 0.0} if method.extra else {}
        plain = replace(plain, weight=1 / len(options.experts))
    return replace(plain, method=method, parameters=parameters)


def _usual_lambda(parameters: Mapping[str, Any], decision: Decision) -> float | None:
    return None if "lambda" in parameters else decision.lambda_


def _result(options: DecideOptions, decision: Decision, settings: RecipeSettings) -> Result:
    guided, control_name, stem = _file_names(options, decision)
    vectors = {key: f"{stem}_{key}_saliency.safetensors" for key in decision.vectors}
    saliency = {key: str(options.out_dir / name) for key, name in vectors.items()}
    table, naming = decision.table, decision.naming
    recipes = {guided: recipe(table, naming, replace(settings, saliency=saliency))}
    control = None
    if options.control is not None:
        plain = _control_settings(options, settings)
        control = control_table(options.control, table)
        control = control.assign(weight=control["weight"] * plain.weight)
        recipes[control_name] = recipe(control, naming, plain)
    files = {name: recipe_bytes(data) for name, data in recipes.items()}
    files |= {vectors[key]: content for key, content in decision.vectors.items()}
    if options.plot:
        pictures = report.heatmaps(options, settings, decision) | dict(decision.pictures())
        files |= {f"{stem}_{end}": content for end, content in pictures.items()}
    check_file_names(list(files), options.config.path)
    return Result(decision, control, tuple(recipes), files)


def _file_names(options: DecideOptions, decision: Decision) -> tuple[str, str, str]:
    """The names of the guided recipe and of its control, and what the names of the other files begin with."""
    mean = () if options.mean_density is None else (f"mean{options.mean_density}",)
    guidance = () if options.method.name == DEFAULT else (options.method.name,)
    tags = (*decision.tags, *mean, *guidance)
    guided = recipe_name(options.config.path, decision.numbers, options.merge_method, tags)
    control = recipe_name(options.config.path, decision.numbers, options.merge_method, (*tags, str(options.control)))
    return guided, control, guided.removesuffix(".yaml")
