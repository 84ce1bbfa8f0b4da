"""The table every guidance method ends in: one row per expert and measured tensor, with its density and weight.

| column | meaning |
|---|---|
| `model` | the expert's type |
| `tensor` | the weight's name, as mergekit plans it |
| `layer`, `component` | where it came from; -1 before the first block, the number of blocks behind the last; component "" for |
| | what no component is (norms, embeddings ...) |
| `density` | share of the tensor's delta that is kept, 0 to 1 |
| `weight` | factor on the delta |
| `params` | number of parameters of the tensor; 0 where it is not known |

Rows are ordered by expert, then component, then layer: the order of the filters in a recipe. Functions return new
tables. "Mean" always is the mean over parameters, not over tensors.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from utils.errors import UserError

COLUMNS = ("model", "tensor", "layer", "component", "density", "weight", "params")
_PER_LAYER = 12  # up to this many layers, "by depth" means per layer; beyond, thirds


def coefficient_table(
    model: str,
    density: pd.DataFrame,
    tensors: Mapping[tuple[int, str], str],
    params: Mapping[str, int],
    *,
    as_weights: bool = False,
) -> pd.DataFrame:
    """The rows of one expert.

    Args:
        model: the expert's type.
        density: layer x component, row numbers are layers; NaN where a layer has no such component.
        tensors: the tensor's name for each (layer, component).
        params: number of parameters per tensor name; may be empty.
        as_weights: use the densities as weights too; otherwise every weight is 1.
    """
    rows = [
        (model, tensors[layer, component], layer, component, float(value), float(value) if as_weights else 1.0)
        for component in density.columns
        for layer, value in enumerate(density[component])
        if value == value
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
    return table.assign(params=[int(params.get(tensor, 0)) for tensor in table["tensor"]])


def mean_density(table: pd.DataFrame, column: str = "density") -> float | None:
    """Mean of a column over the parameters of the table's tensors, or None if their sizes are not known."""
    weights = table["params"].to_numpy(dtype="float64")
    if not len(weights) or not (weights > 0).all():
        return None
    return float((table[column].to_numpy() * weights).sum() / weights.sum())


def with_mean_density(table: pd.DataFrame, budget: float, *, as_weights: bool = False) -> pd.DataFrame:
    """Scale each expert's densities so that their mean is `budget`: `min(1, c * density)`, c by bisection.

    Raises:
        UserError: tensor sizes are not known, or densities of 0 leave too little to reach the budget.
    """
    parts = []
    for model, part in table.groupby("model", sort=False):
        if mean_density(part) is None:
            raise UserError(_NO_SIZES.format(flag="--mean_density"), "tensor-sizes-unknown")
        density, weights = part["density"].to_numpy(), part["params"].to_numpy(dtype="float64")
        reachable = float(np.average(density > 0, weights=weights))
        if budget > reachable:
            raise UserError(
                f"--mean_density {budget} cannot be reached for {model}: tensors with density 0 stay at 0, the others "
                f"hold {reachable:.4g} of the parameters; raise --gamma above 0",
                "mean-density-unreachable",
            )
        scaled = np.minimum(1.0, _scale_for(density, weights, budget) * density)
        parts.append(part.assign(density=scaled, weight=scaled if as_weights else part["weight"]))
    return pd.concat(parts)


def _scale_for(density: np.ndarray, weights: np.ndarray, budget: float) -> float:
    """The c for which the weighted mean of min(1, c * density) is `budget`; to the last bit of c."""

    def excess(scale: float) -> float:
        return float(np.average(np.minimum(1.0, scale * density), weights=weights)) - budget

    low, high = 0.0, 1.0 / float(density[density > 0].min())
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return min((low, high), key=lambda scale: abs(excess(scale)))


def lines_control(table: pd.DataFrame) -> pd.DataFrame:
    """LiNeS (arXiv 2410.17146): weights that grow linearly with depth, threefold from the first layer to the last.

    Each expert keeps its mean density and its mean weight m: the weight of layer l of L is c (1/2 + l / (L - 1)) m, with
    c so that the mean over parameters is m. What lies before the first layer counts as the first, what lies behind the
    last as the last.

    Raises:
        UserError: tensor sizes are not known.
    """
    parts = []
    for _, part in uniform_control(table).groupby("model", sort=False):
        depth = part["layer"].clip(0, None)
        last = of_components(part)["layer"].max()
        slope = 0.5 + depth.clip(0, last) / max(1, last)
        line = part.assign(weight=slope)
        parts.append(line.assign(weight=slope * (part["weight"].iloc[0] / mean_density(line, "weight"))))
    return pd.concat(parts)


def uniform_control(table: pd.DataFrame) -> pd.DataFrame:
    """Each expert's components all at their mean density, and all its tensors at their mean weight.

    Raises:
        UserError: tensor sizes are not known.
    """
    parts = []
    for _, part in table.groupby("model", sort=False):
        measured = part["component"] != ""
        density, weight = mean_density(part[measured]), mean_density(part, "weight")
        if density is None or weight is None:
            raise UserError(_NO_SIZES.format(flag="--control"), "tensor-sizes-unknown")
        parts.append(part.assign(density=part["density"].where(~measured, density), weight=weight))
    return pd.concat(parts)


_NO_SIZES = (
    "{flag} needs the sizes of the tensors, which neither norms.csv nor a base checkpoint on this machine gives: "
    "measure with lewis_importance.py, or put the base model where the config says"
)


def by_depth(table: pd.DataFrame, column: str = "density") -> list[tuple[str, float]]:
    """(label, mean of a column) per layer, or per third of the depth in deeper models."""
    layers = sorted(set(table["layer"]))
    if len(layers) <= _PER_LAYER:
        groups = [[layer] for layer in layers]
    else:
        cuts = [round(len(layers) * part / 3) for part in range(4)]
        groups = [layers[start:end] for start, end in itertools.pairwise(cuts)]
    labels = [f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]
    return [
        (label, average(table[table["layer"].isin(group)], column)) for label, group in zip(labels, groups, strict=True)
    ]


def by_component(table: pd.DataFrame, column: str = "density") -> list[tuple[str, float]]:
    """(component, mean of a column) in the table's order."""
    return [(str(name), average(part, column)) for name, part in table.groupby("component", sort=False)]


def averaged_over(table: pd.DataFrame) -> str:
    """What `average` takes the mean over, in words."""
    return "tensors, sizes are not known" if mean_density(table) is None else "parameters"


def of_components(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of components: without norms, embeddings and what else no component is."""
    return table[table["component"] != ""]


def average(table: pd.DataFrame, column: str) -> float:
    """Mean of a column over parameters, or over tensors where their sizes are not known."""
    mean = mean_density(table, column)
    return float(table[column].mean()) if mean is None else mean
