"""What command 2 prints: the choices first, then what was decided, then what to do next."""

import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.commands.next_command import next_command
from utils.commands.options import DecideOptions
from utils.guidance.expert_tokens import few_tokens_lines, read_fewest
from utils.guidance.guided_recipe import Control, GuidedRecipe
from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.guidance.portable_recipe import Portable
from utils.guidance.routing import routing_lines
from utils.guidance.text_gain import ACCEPT
from utils.recipes.coefficients import average, averaged_over, by_component, by_depth, of_components
from utils.recipes.filters import Coverage, NamedTensor, name_template
from utils.recipes.global_parameters import normalizes
from utils.recipes.recipe import DTYPE, RecipeSettings
from utils.runtime import versions_line

_PER_LINE = 6


def say_choices(
    options: DecideOptions,
    measured: MeasuredPair,
    made: GuidedRecipe,
    routing: pd.DataFrame | None,
    tokens: pd.DataFrame | None,
) -> None:
    """Print what the recipe is made from, and how; the tables of routers and of experts' tokens, if there are such."""
    settings, decision, asked = made.settings, made.decision, made.choices.options
    given, method = options.config.global_parameters, settings.method
    print(versions_line("mergekit", "transformers", "pandas"))
    if options.said:
        print(options.said)
    print(f"guidance: {asked.method.name}, {asked.method.summary}")
    places = of_components(decision.table)
    size = f"{places['layer'].nunique()} layers x {places['component'].nunique()} components"
    experts = ", ".join(entry.type for entry in settings.experts)
    print(f"measured: {size}, experts {experts}{_samples(measured.manifest)}")
    for line in _texts(measured.manifest, [entry.type for entry in settings.experts]):
        print(f"{'':<9} {line}")
    if few := asked.method.few_samples(_options(measured.manifest).get("nsamples")):
        print(f"note:     {few}")
    if tokens is not None:
        fewest, merged = read_fewest(measured.manifest), [entry.type for entry in settings.experts]
        for line in few_tokens_lines(tokens[tokens["model"].isin(merged)], fewest):
            print(f"experts:  {line}")
    print(f"method:   {method.name}, {_what_it_does(given, settings)}")
    idle = set(given) - set(settings.parameters) if method.own else set()
    if idle:
        print(f"left out: {', '.join(sorted(idle))} of global_parameters, which {method.name} does not have")
    for label, text in decision.how:
        print(f"{label + ':' if label else '':<9} {text}")
    if settings.lambda_ is not None:
        before = given.get("lambda")
        print(f"lambda:   {settings.lambda_}" + (f" (replaces the config's {before})" if before is not None else ""))
    if method.extra:
        wanted = settings.parameters.get(method.extra, method.extra_default)
        print(
            f"{method.extra + ':':<9} {wanted}, less where a density needs it (mergekit's {method.extra}, not LEWIS's)"
        )
    if made.only_here and not method.own:
        print(f"note:     merge with utils/merger.py: {made.only_here}")
    if settings.routers.said:
        print(f"routers:  {settings.routers.said}")
        for line in _routing(routing, [entry.type for entry in settings.experts]):
            print(f"{'':<9} {line}")
    if settings.dtype != DTYPE:
        print(f"merged:   in {settings.dtype}")
    if settings.out_dtype:
        print(f"written:  in {settings.out_dtype}")


def _routing(routing: pd.DataFrame | None, experts: Sequence[str]) -> list[str]:
    """Lines about what the base's router would do with each expert's tokens."""
    if routing is None:
        return [
            "how many tokens would keep their experts with the base's router was not measured (an earlier version, or tables "
            "of another program); lewis_importance.py measures it"
        ]
    return routing_lines(routing[routing["model"].isin(experts)])


def _what_it_does(given: Mapping[str, Any], settings: RecipeSettings) -> str:
    method = settings.method
    does = [f"keeps {method.keeps}"] if method.keeps else []
    if not method.keeps or method.whole:
        does.append(method.does)
    if "normalize" in method.switches:
        divides = normalizes(method, settings.parameters)
        replaced = " (weights per layer need that; the config's true is for densities)"
        does.append(
            f"normalize {'true' if divides else 'false'}{replaced if given.get('normalize') and not divides else ''}"
        )
    if method.own:
        does += [
            f"{name} {str(given[name]).lower()}" for name in method.switches if name in given and name != "normalize"
        ]
    shared = (
        number.name for number in method.numbers if number.name != "lambda" and number.name in settings.parameters
    )
    return "; ".join([*does, *(f"{name} {settings.parameters[name]}" for name in shared)])


def say_result(made: GuidedRecipe, control: Control | None, remarks: Sequence[str] = ()) -> None:
    """Print each expert's densities and weights, the guidance's remarks, what the filters cover, and the control's."""
    settings, table, naming = made.settings, made.decision.table, made.decision.naming
    columns = {"density": "density"} if settings.method.keeps else {}
    if settings.as_weights or settings.as_factors:
        columns["weight"] = "factor" if settings.as_factors else "weight"
    for entry in settings.experts:
        part = table[table["model"] == entry.type]
        print(f"\n{entry.type} ({entry.name})")
        for column, label in columns.items():
            _say_column(part if column == "weight" else of_components(part), column, label)
        if control is not None:
            own = control.table[control.table["model"] == entry.type]
            _say_control(of_components(own), columns, control.kind)
    for line in (*made.decision.after, *remarks):
        print(line)
    if not columns:
        own = "those of routers alone; every other" if settings.routers.filters else "none; every"
        print(f"\nfilters: {own} tensor of an expert is merged alike")
        return
    count = len(set((naming.group_filters or naming.filters).values()))
    print(f"\nfilters: {count} per expert; {naming.evidence}")
    if naming.coverage is not None:
        _say_coverage(naming.coverage, settings.routers.tensors)


def _say_column(part: pd.DataFrame, column: str, label: str) -> None:
    values = part[column]
    shown = f"mean {average(part, column):.4f}, max {values.max():.4f} (mean over {averaged_over(part)})"
    print(f"  {label:<13} min {values.min():.4f}, {shown}")
    _say_pairs("by layer", by_depth(part, column))
    measured = of_components(part)
    alike = measured["component"].map(name_template)  # experts stored apart are hundreds of components
    components = by_component(measured.assign(component=alike), column)
    if len({f"{value:.3f}" for _, value in components}) == 1:  # minmax keeps the components' equal sums equal
        components = [("each", components[0][1])]
    _say_pairs("by component", components)


def _say_control(part: pd.DataFrame, columns: Container[str], kind: str) -> None:
    density, weight, said = part["density"].iloc[0], part["weight"], []
    if "density" in columns:
        said.append(f"density {density:.6f} everywhere")
    if kind == "lines" or "density" not in columns or "weight" in columns or float(weight.iloc[0]) != 1:
        spread = f"{weight.min():.6f}" if weight.min() == weight.max() else f"{weight.min():.4f} to {weight.max():.4f}"
        said.append(f"weight {spread}" + (" by depth" if kind == "lines" else " everywhere"))
    print(f"  control       {', '.join(said)}")


def say_files(
    options: DecideOptions,
    measured: MeasuredPair,
    made: GuidedRecipe,
    controls: Sequence[str],
    names: Sequence[str],
    written: Sequence[str],
) -> None:
    """Print what was written, what was there already, and the next commands.

    Args:
        options: for the folder.
        measured: what the recipe was made of.
        made: the guided recipe.
        controls: file names of the recipes to compare it with.
        names: every file name.
        written: those that were not there with this very content.
    """
    if not options.quiet:
        print()
    for name in names:
        path = options.out_dir / name
        print(f"wrote {path}" if name in written else f"{path} already holds exactly this; left as it is")
    remote, recipes = {"trust_remote_code": options.trust_remote_code}, (made.name, *controls)
    print("next (not mergekit-yaml):" if made.only_here else "next:")
    for recipe in recipes:
        flags = {"merge_config": options.out_dir / recipe, "output_path": _model_folder(options, recipe), **remote}
        print(next_command("utils/merger.py", flags))
    if made.decision.fits_adapter:
        print("or, as an adapter that peft loads:")
        flags = {
            "merge_config": options.out_dir / made.name,
            "output_path": f"{_model_folder(options, made.name)}_adapter",
        }
        print(next_command("utils/merger.py", {**flags, "adapter": True, **remote}))
    for finer in _refined_by(made):
        print(
            f"or, to find by gradient how much of each expert's part to take (--guidance {finer.name}, docs/quality.md):"
        )
        flags = {
            "config": options.config.path,
            "out_dir": options.out_dir.parent / finer.name,
            "guidance": finer.name,
            finer.file_flags[0]: options.out_dir / made.name,
            ACCEPT: bool(measured.option(ACCEPT)),  # the text is the same
        }
        print(next_command("lewis_importance.py", {**flags, **remote}))
    print("or, to see first on held-out text whether it helps:")
    out = options.out_dir.parent / "evaluation"
    candidates = [options.out_dir / recipe for recipe in recipes]
    print(next_command("utils/evaluator.py", {"config": options.config.path, "out_dir": out, **remote}, candidates))


def _refined_by(made: GuidedRecipe) -> list[GuidanceMethod]:
    """The guidances that such a recipe of several experts gains from when they start at it: at none of one that cuts entries,
    weighs routers on their own, or aligns tokens."""
    several, whole = len(made.settings.experts) > 1, (made.decision.table["density"] == 1).all()
    if not several or not whole or made.aligned or isinstance(made.choices.options.router, float):
        return []
    own, merge_method = made.choices.options.method, made.settings.method.name
    return [one for one in guidance_methods().values() if merge_method in one.refines and one is not own]


def say_portable(options: DecideOptions, portable: Portable) -> None:
    """Print what is in the recipe for stock mergekit, and what runs it."""
    recipe, model = options.out_dir / portable.name, _model_folder(options, portable.name)
    print(f"with stock mergekit ({portable.said}):")
    print(f"  mergekit-yaml {shlex.quote(str(recipe))} {shlex.quote(str(model))}")
    by_rank = " (--no-fast_selection gives the same bits)" if portable.keeps else ", to the same bits"
    print(f"or with this project's checks{by_rank}:")
    flags = {"merge_config": recipe, "output_path": model, "fused_experts": portable.fused}
    print(next_command("utils/merger.py", {**flags, "trust_remote_code": options.trust_remote_code}))


def _model_folder(options: DecideOptions, recipe: str) -> Path:
    return options.out_dir.parent / "merged_models" / recipe.removesuffix(".yaml").removesuffix("_merge_config")


def _options(manifest: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The settings that were measured with, as the manifest has them; empty where it does not say."""
    options = (manifest or {}).get("options")
    return options if isinstance(options, dict) else {}


def _samples(manifest: Mapping[str, Any] | None) -> str:
    options = _options(manifest)
    if not options:
        return ""
    own = _calibration(options)
    of = "each expert's own text" if own else _shown(options.get("dataset"))
    return f"; {options.get('nsamples')} samples of {of}, sparsity_ratio {options.get('sparsity_ratio')}"


def _texts(manifest: Mapping[str, Any] | None, experts: Sequence[str]) -> list[str]:
    """A line for each text that experts have of their own."""
    options = _options(manifest)
    own = _calibration(options)
    users: dict[str, list[str]] = {}
    for expert in experts if own else ():
        users.setdefault(_shown(own.get(expert, options.get("dataset"))), []).append(expert)
    return [f"{', '.join(names)} on {text}" for text, names in users.items()]


def _calibration(options: Mapping[str, Any]) -> Mapping[str, Any]:
    own = options.get("calibration")
    return own if isinstance(own, dict) else {}


def _shown(text: Any) -> str:
    """A text as people know it: its path or name, and what is taken of a row."""
    if not isinstance(text, dict):
        return str(text)
    details = [f"{key} {text[key]!r}" for key in ("subset", "split", "text", "messages") if text.get(key)]
    return f"{text.get('path') or text.get('name')}" + (f" ({', '.join(details)})" if details else "")


def _say_pairs(label: str, pairs: Sequence[tuple[str, float]]) -> None:
    for start in range(0, len(pairs), _PER_LINE):
        shown = "  ".join(f"{name}: {value:.3f}" for name, value in pairs[start : start + _PER_LINE])
        print(f"  {label if start == 0 else '':<13} {shown}")


def _say_coverage(coverage: Coverage, routers: Sequence[str]) -> None:
    share = coverage.params / coverage.all_params
    print(
        f"covered: {coverage.tensors} of {coverage.all_tensors} tensors, {share:.1%} of {coverage.all_params:,} "
        "parameters"
    )
    if coverage.uncovered:
        print("not covered (density 1, weight 1):")
    for kind, tensors in coverage.uncovered.items():
        _say_uncovered(kind, [one for one in tensors if one.name not in routers], coverage)
    chosen = [one for tensors in coverage.uncovered.values() for one in tensors if one.name in routers]
    _say_uncovered("but routers, as said above", chosen, coverage)


def _say_uncovered(kind: str, tensors: Sequence[NamedTensor], coverage: Coverage) -> None:
    if tensors:
        params = sum(tensor.params for tensor in tensors)
        print(f"  {kind}: {params / coverage.all_params:.1%}, {_templates(tensors)}")


def _templates(tensors: Sequence[NamedTensor]) -> str:
    counts: Mapping[str, int] = {}
    for tensor in tensors:
        template = name_template(tensor.name)
        counts = {**counts, template: counts.get(template, 0) + 1}
    return ", ".join(name if count == 1 else f"{name} (x{count})" for name, count in counts.items())
