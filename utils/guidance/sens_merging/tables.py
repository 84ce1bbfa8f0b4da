"""Sens-Merging's part of the dataframe folder, and its reading.

| file | one row per |
|---|---|
| `sens_merging_sensitivity.csv` | expert and block: `sensitivity`, the mean over samples of the sum of abs(p * dL/dp) |
| `sens_merging_distances.csv` | ordered pair of experts: mean `distance` of their logits over the `tokens` of the text of `other` |
| `sens_merging_tensors.csv` | tensor of the base's checkpoint: `layer` (-1 before the blocks, their number behind), `component`, `params` |
| `sens_merging_losses.csv` | expert: mean `loss` of its `samples` on its own text, nats per token; for people, not read again |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import raise_collected
from utils.guidance.folder import read_table
from utils.guidance.sens_merging.method import DISTANCES, LOSSES, SENSITIVITY, TENSORS
from utils.pair.config import PairConfig

FILES: Mapping[str, tuple[str, ...]] = {
    SENSITIVITY: ("model", "layer", "sensitivity"),
    DISTANCES: ("model", "other", "distance", "tokens"),
    TENSORS: ("tensor", "layer", "component", "params"),
    LOSSES: ("model", "samples", "loss"),
}


@dataclass(frozen=True)
class Sensitivity:
    """What was measured, checked: float64 `sensitivities` [experts, blocks] and `distances` [experts, experts] (row: the
    model, column: the other, on whose text; 0 on the diagonal), in the order of the experts asked for. `tensors` has the
    columns of its file, ordered by component, then layer; `component` is "" for what is none."""

    sensitivities: np.ndarray
    distances: np.ndarray
    tensors: pd.DataFrame

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.sensitivities.shape[1]


def read_sensitivity(folder: Path, experts: Sequence[str], config: PairConfig) -> Sensitivity:
    """Read and check the tables.

    Args:
        folder: the dataframe folder.
        experts: the types to merge.
        config: the pair config, which may know further experts.

    Raises:
        UserError: a file is missing or malformed; rows are missing, given twice or of no expert of the config; a value is
            not a finite number of its kind. All problems of the tables are in the one message.
    """
    tables = {name: read_table(folder, name, FILES[name]) for name in (TENSORS, SENSITIVITY, DISTANCES)}
    tensors, blocks, problems = _checked_tensors(tables[TENSORS])
    known = {entry.type for entry in config.experts}
    for name, keys in ((SENSITIVITY, ("model",)), (DISTANCES, ("model", "other"))):
        strangers = {str(value) for key in keys for value in tables[name][key]} - known
        problems += [f"{name}: {value!r} is no expert of the config" for value in sorted(strangers)]
    places = [(model, layer) for model in experts for layer in range(blocks)]
    pairs = [(model, other) for model in experts for other in experts if other != model]
    sensitivities, found = _values(tables[SENSITIVITY], SENSITIVITY, ("model", "layer"), "sensitivity", places, experts)
    problems += found
    distances, found = _values(tables[DISTANCES], DISTANCES, ("model", "other"), "distance", pairs, experts)
    problems += found
    raise_collected(problems, f"dataframe folder {folder}")
    table = np.zeros((len(experts), len(experts)))
    for (model, other), value in distances.items():
        table[experts.index(model), experts.index(other)] = value
    ordered = np.array([sensitivities[place] for place in places]).reshape(len(experts), blocks)
    return Sensitivity(ordered, table, tensors)


def _values(
    table: pd.DataFrame,
    file: str,
    keys: tuple[str, str],
    column: str,
    wanted: Sequence[tuple[str, object]],
    experts: Sequence[str],
) -> tuple[dict[tuple[str, object], float], list[str]]:
    """The numbers of a column by their key, and what is wrong with the rows of the experts asked for."""
    values: dict[tuple[str, object], float] = {}
    problems = []
    for model, second, value in zip(table[keys[0]], table[keys[1]], table[column], strict=True):
        if str(model) not in experts or (keys[1] == "other" and str(second) not in experts):
            continue
        key = (str(model), str(second)) if keys[1] == "other" else (str(model), _whole(second))
        where = f"{file}: {keys[0]} {model}, {keys[1]} {second}"
        if key not in wanted:
            problems.append(f"{where}: there should be no such row")
        elif key in values:
            problems.append(f"{where} is there twice")
        elif (number := _number(value)) is None:
            problems.append(f"{where}: {column} is {value}, not a finite number of at least 0")
        else:
            values[key] = number
            continue
        values.setdefault(key, 0.0)
    problems += [f"{file}: no row for {keys[0]} {a}, {keys[1]} {b}" for a, b in wanted if (a, b) not in values]
    return values, problems


def _checked_tensors(table: pd.DataFrame) -> tuple[pd.DataFrame, int, list[str]]:
    """The tensors in order, the number of blocks they are of, and what is wrong with them."""
    table = table.assign(component=table["component"].fillna("").astype(str))
    problems = []
    for row in table.itertuples():
        where = f"{TENSORS}: {row.tensor}"
        if not isinstance(row.tensor, str):
            problems.append(f"{where}: not a tensor's name")
        if _whole(row.layer, -1) is None:
            problems.append(f"{where}: layer {row.layer} is not a whole number of at least -1")
        if not _whole(row.params):
            problems.append(f"{where}: params {row.params} is not a whole number above 0")
    problems += [f"{TENSORS}: {name} is there twice" for name in table["tensor"][table["tensor"].duplicated()]]
    parts = table[table["component"] != ""]
    if problems or parts.empty:
        return table, 0, problems or [f"{TENSORS}: no row has a component; measure again with --overwrite"]
    table = table.astype({"layer": "int64", "params": "int64"})
    names, blocks = list(dict.fromkeys(parts["component"])), int(parts["layer"].max()) + 1
    problems += _grid_problems(table, names, blocks)
    order = {name: place for place, name in enumerate([*names, ""])}
    return table.sort_values(["component", "layer"], key=_ordered_by(order), kind="stable"), blocks, problems


def _grid_problems(table: pd.DataFrame, components: Iterable[str], blocks: int) -> list[str]:
    """Each component is in each block once, and nothing lies deeper than behind the last."""
    counts = table.groupby(["component", "layer"]).size()
    problems = []
    for component in components:
        for layer in range(blocks):
            if (count := counts.get((component, layer), 0)) != 1:
                problems.append(f"{TENSORS}: {count} rows for layer {layer}, component {component}; there must be one")
        if counts.get((component, -1), 0):
            problems.append(f"{TENSORS}: component {component} cannot be at layer -1")
    deepest = int(table["layer"].max())
    if deepest > blocks:
        problems.append(f"{TENSORS}: layer {deepest}, but the components are of {blocks} blocks")
    return problems


def _ordered_by(order: Mapping[str, int]):
    return lambda column: column.map(order) if column.name == "component" else column


def _number(value: object) -> float | None:
    """A finite number of at least 0, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if 0 <= found < float("inf") else None


def _whole(value: object, low: int = 0) -> int | None:
    """A whole number of at least `low`, or None."""
    try:
        found = int(value)
        return found if found == float(value) and found >= low else None
    except (TypeError, ValueError, OverflowError):
        return None
