"""What command 2 prints, and the heatmaps it draws: the choices first, then what was decided, then what to do next."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from utils.coefficients import by_component, by_depth, mean_density
from utils.filters import Coverage, NamedTensor, name_template
from utils.frames import Measurements
from utils.guidance.lewis import share_at_bounds
from utils.method_rules import DensityMethod, normalizes
from utils.naming import Naming
from utils.runtime import versions

if TYPE_CHECKING:
    import pandas as pd

    from utils.decision import DecideOptions

_PER_LINE = 6


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr, each once."""
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)


def say_choices(options: "DecideOptions", method: DensityMethod, measured: Measurements) -> None:
    """Print what the recipe will be made from, and how."""
    found = versions()
    print(
        "versions: " + ", ".join(f"{name} {found[name]}" for name in ("python", "mergekit", "transformers", "pandas"))
    )
    frame = next(iter(measured.deltas.values()))
    experts = ", ".join(entry.type for entry in options.experts)
    print(f"measured: {len(frame)} layers x {frame.shape[1]} components, experts {experts}{_samples(measured)}")
    divides = "true" if normalizes(method, options.config.global_parameters) else "false"
    print(f"method:   {method.name}, keeps {method.keeps}; normalize {divides}")
    print(f"density:  {_bounds(options)}")
    if options.mean_density is not None:
        print(
            f"          then min(1, c x density) with a mean of {options.mean_density} per expert; gamma and epsilon "
            "shape the densities but no longer bind them"
        )
    print(f"weight:   {'the same numbers' if options.apply_lewis_to_weights else '1'}")
    if options.lambda_ is not None:
        replaced = options.config.global_parameters.get("lambda")
        print(f"lambda:   {options.lambda_}" + (f" (replaces the config's {replaced})" if replaced is not None else ""))
    if method.extra:
        wanted = options.config.global_parameters.get(method.extra, method.extra_default)
        print(
            f"{method.extra + ':':<9} {wanted}, less where a density needs it (mergekit's {method.extra}, not LEWIS's)"
        )
    if options.out_dtype:
        print(f"written:  in {options.out_dtype}")


def say_result(options: "DecideOptions", table: "pd.DataFrame", control: "pd.DataFrame | None", naming: Naming) -> None:
    """Print each expert's densities, what the filters cover, and the control's densities."""
    for entry in options.experts:
        part = table[table["model"] == entry.type]
        density, mean = part["density"], mean_density(part)
        kind = "mean over parameters" if mean is not None else "mean over tensors, sizes are not known"
        shown = mean if mean is not None else float(density.mean())
        print(f"\n{entry.type} ({entry.name})")
        print(f"  density       min {density.min():.4f}, mean {shown:.4f}, max {density.max():.4f} ({kind})")
        _say_pairs("by layer", by_depth(part))
        components = by_component(part)
        if len({f"{value:.3f}" for _, value in components}) == 1:  # minmax keeps the components' equal sums equal
            components = [("each", components[0][1])]
        _say_pairs("by component", components)
        if options.bound == "clip" and options.mean_density is None:
            low, high = share_at_bounds(part[["density"]], options.gamma, options.epsilon)
            print(f"  at the bounds {low:.0%} of the tensors at {options.gamma}, {high:.0%} at {options.epsilon}")
        if control is not None:
            print(f"  control       {control[control['model'] == entry.type]['density'].iloc[0]:.6f} everywhere")
    print(f"\nfilters: {len(naming.filters)} per expert; {naming.evidence}")
    if naming.coverage is not None:
        _say_coverage(naming.coverage)


def say_files(options: "DecideOptions", recipes: Sequence[str], names: Sequence[str], written: Sequence[str]) -> None:
    """Print what was written, what was there already, and the next command for each recipe.

    Args:
        options: for the folder.
        recipes: file names of the recipes, the guided one first.
        names: every file name.
        written: those that were not there with this very content.
    """
    print()
    for name in names:
        path = options.out_dir / name
        print(f"wrote {path}" if name in written else f"{path} already holds exactly this; left as it is")
    print("next:")
    for recipe, suffix in zip(recipes, ("", "_uniform"), strict=False):
        target = options.out_dir.parent / f"merged_models{suffix}"
        print(
            f"  python3 utils/merger.py --output_path {shlex.quote(str(target))} \\\n"
            f"    --merge_config {shlex.quote(str(options.out_dir / recipe))}"
        )


def heatmaps(options: "DecideOptions", table: "pd.DataFrame") -> dict[str, bytes]:
    """A PNG per expert type; all on one color scale."""
    from utils.plots import density_heatmap

    low, high = options.gamma, options.epsilon
    if options.mean_density is not None:
        low, high = float(table["density"].min()), float(table["density"].max())
    pictures = {}
    for entry in options.experts:
        part = table[table["model"] == entry.type]
        wide = part.pivot(index="layer", columns="component", values="density")[list(dict.fromkeys(part["component"]))]
        mean = mean_density(part)
        shown = f"mean {mean:.4f}" if mean is not None else f"mean over tensors {part['density'].mean():.4f}"
        scaled = "" if options.mean_density is None else f", scaled to mean {options.mean_density}"
        bounds = f"{options.bound} {options.gamma} to {options.epsilon}{scaled}"
        pictures[entry.type] = density_heatmap(
            wide, f"{entry.type}: {options.merge_method} density\n{bounds}; {shown}", low, high
        )
    return pictures


def _samples(measured: Measurements) -> str:
    options = (measured.manifest or {}).get("options")
    if not isinstance(options, dict):
        return ""
    dataset = options.get("dataset")
    source = (dataset.get("path") or dataset.get("name")) if isinstance(dataset, dict) else None
    return f"; {options.get('nsamples')} samples of {source}, sparsity_ratio {options.get('sparsity_ratio')}"


def _bounds(options: "DecideOptions") -> str:
    gamma, epsilon = options.gamma, options.epsilon
    if options.bound == "clip":
        return f"clip: delta / largest delta of the expert, clipped to [{gamma}, {epsilon}]"
    return f"minmax: {gamma} for the smallest delta of the expert to {epsilon} for the largest"


def _say_pairs(label: str, pairs: Sequence[tuple[str, float]]) -> None:
    for start in range(0, len(pairs), _PER_LINE):
        shown = "  ".join(f"{name}: {value:.3f}" for name, value in pairs[start : start + _PER_LINE])
        print(f"  {label if start == 0 else '':<13} {shown}")


def _say_coverage(coverage: Coverage) -> None:
    share = coverage.params / coverage.all_params
    print(
        f"covered: {coverage.tensors} of {coverage.all_tensors} tensors, {share:.1%} of {coverage.all_params:,} "
        "parameters"
    )
    if coverage.uncovered:
        print("not covered (density 1, weight 1):")
    for kind, tensors in coverage.uncovered.items():
        params = sum(tensor.params for tensor in tensors)
        print(f"  {kind}: {params / coverage.all_params:.1%}, {_templates(tensors)}")


def _templates(tensors: Sequence[NamedTensor]) -> str:
    counts: Mapping[str, int] = {}
    for tensor in tensors:
        template = name_template(tensor.name)
        counts = {**counts, template: counts.get(template, 0) + 1}
    return ", ".join(name if count == 1 else f"{name} (x{count})" for name, count in counts.items())
