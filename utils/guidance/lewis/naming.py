"""The names of the tensors that LEWIS measured: as recorded, as in the checkpoint, or by assumption."""

import re
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from utils.errors import Problem, raise_collected
from utils.guidance.lewis.method import NORMS
from utils.guidance.lewis.tables import TEXT, Measurements
from utils.pair.config import PairConfig
from utils.recipes import filters
from utils.recipes.filters import NamedTensor, Place
from utils.recipes.naming import NOT_HERE, RECORDED_EVIDENCE, Naming, WrittenTensors

_BLOCK_TENSOR = re.compile(r"(?P<prefix>.+?)\.(?P<layer>\d+)\.(?P<path>.+)\.weight")


def name_tensors(config: PairConfig, measured: Measurements, written: WrittenTensors | None) -> Naming:
    """Name the measured tensors as mergekit will see them, and prove their filters as far as this machine allows.

    Names come from `norms.csv`, else from what the merge writes, else they are assumed as the released code does.

    Args:
        config: the pair config.
        measured: the dataframe folder.
        written: what the merge writes, to prove the filters against; None without the base checkpoint.

    Raises:
        UserError: names are missing or ambiguous, or a filter hits something else.
    """
    frame = next(iter(measured.deltas.values()))
    layers, components = len(frame), list(frame.columns)
    recorded, params = None, {}
    if measured.norms is not None:
        recorded, params = measured_names(measured.norms, config.base_model_type, layers, components, frame.notna())
    if written is None:
        return _unproven(recorded or assumed_names(layers, components, config.prefix_mapping), params)
    if recorded:
        names = filters.as_planned(recorded, written.plan, written.where)
    else:
        names = found_names(written.tensors, layers, components, config.prefix_mapping, written.where)
    proof, before = filters.exact_filters(list(names.values()), written.names, written.where)
    sizes = {tensor.name: tensor.params for tensor in written.tensors}
    covered = filters.coverage(proof, written.tensors, before)
    return Naming(names, proof, sizes, covered, written.evidence, before=before)


def _unproven(names: Mapping[Place, str], params: Mapping[str, int]) -> Naming:
    proof, before = filters.exact_filters(list(names.values()), list(names.values()), NOT_HERE)
    if params:
        return Naming(names, proof, params, None, RECORDED_EVIDENCE, before=before)
    warning = (
        f"nothing could be proven: {NOT_HERE} and the dataframe folder records no tensor names, so the filters are "
        "model.layers.<layer>.<path>; one that matches nothing leaves its tensor at density 1"
    )
    return Naming(names, proof, {}, None, "assumed, not proven", (warning,), before=before)


def measured_names(
    norms: pd.DataFrame, base: str, layers: int, components: Sequence[str], has: pd.DataFrame | None = None
) -> tuple[dict[Place, str], dict[str, int]]:
    """Tensor names by (layer, component), and sizes by tensor name, from the base's rows of `norms.csv`.

    Args:
        norms: the table.
        base: the base's type.
        layers, components: the places.
        has: layer x component, whether there is such a place (not every block has every component); None: all are.

    Raises:
        UserError: a place is missing.
    """
    own = norms[norms["model"] == base]
    if TEXT in own.columns:  # the base was measured on several texts
        own = own[own[TEXT] == own[TEXT].iloc[0]] if len(own) else own
    names = {(row.layer, row.component): row.tensor for row in own.itertuples()}
    wanted = [(layer, component) for component in components for layer in range(layers)]
    if has is not None:
        wanted = [place for place in wanted if has.at[place]]
    problems = [
        Problem(f"layer {layer}, component {name} is missing", "table-row-missing")
        for layer, name in wanted
        if (layer, name) not in names
    ]
    raise_collected(problems[:5], f"{NORMS}, rows of {base!r}")
    return {place: names[place] for place in wanted}, dict(zip(own["tensor"], own["params"].tolist(), strict=True))


def found_names(
    tensors: Iterable[NamedTensor], layers: int, components: Sequence[str], prefixes: Mapping[str, str], where: str
) -> dict[Place, str]:
    """Tensor names by (layer, component) from a checkpoint's own names: `<block prefix>.<layer>.<path>.weight`.

    A component means the path that `prefixes` gives, else the path that equals it or ends with it.

    Raises:
        UserError: a component fits no path or several (all candidates are listed), or not every layer has it.
    """
    found: dict[tuple[str, str], dict[int, str]] = {}  # (block prefix, path) -> layer -> name
    for tensor in tensors:
        match = _BLOCK_TENSOR.fullmatch(tensor.name)
        if match and tensor.axes > 1:
            found.setdefault((match["prefix"], match["path"]), {})[int(match["layer"])] = tensor.name
    names: dict[Place, str] = {}
    problems = []
    for component in components:
        wanted = prefixes.get(component, component)
        fitting = [key for key in found if key[1] == wanted]
        if component not in prefixes:
            fitting = fitting or [key for key in found if key[1].endswith("." + wanted)]
        if len(fitting) != 1:
            listed = [f"{prefix}.*.{path}" for prefix, path in (fitting or found)]
            state = "means several tensors" if fitting else f"({wanted}) names no tensor"
            message = f"component {component!r} {state}; there are {', '.join(listed)}. Use prefix_mapping"
            problems.append(Problem(message, "component-ambiguous" if fitting else "component-unknown"))
            continue
        there = found[fitting[0]]
        if sorted(there) != list(range(layers)):
            message = (
                f"component {component!r}: the delta tables have {layers} rows, the model has "
                f"{'.'.join([fitting[0][0], '*', fitting[0][1]])} in {len(there)} layers"
            )
            problems.append(Problem(message, "table-row-missing"))
        names |= {(layer, component): there[layer] for layer in range(layers) if layer in there}
    raise_collected(problems, where)
    return names


def assumed_names(layers: int, components: Sequence[str], prefixes: Mapping[str, str]) -> dict[Place, str]:
    """Tensor names as the released code assumes them: `model.layers.<layer>.<path>.weight`."""
    return {
        (layer, component): f"model.layers.{layer}.{prefixes.get(component, component)}.weight"
        for component in components
        for layer in range(layers)
    }
