"""Sens-Merging's part of the dataframe folder, and its reading.

| file | one row per |
|---|---|
| `sens_merging_sensitivity.csv` | expert and block: `sensitivity`, the mean over samples of the sum of abs(p * dL/dp) |
| `sens_merging_distances.csv` | ordered pair of experts: mean `distance` of their logits over the `tokens` of the text of `other` |
| `sens_merging_tensors.csv` | tensor of the base's checkpoint: `layer` (-1 before the blocks, their number behind), `component`, `params` |
| `sens_merging_outside.csv` | expert and tensor outside the blocks: `sensitivity`, as above; `tied_to` is the tensor whose parameter it shares |
| `sens_merging_losses.csv` | expert: mean `loss` of its `samples` on its own text, nats per token; for people, not read again |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import Problem, UserError, raise_collected
from utils.guidance.columns import (
    TableFormat,
    expert,
    grid_problems,
    number,
    read_tables,
    row_problems,
    text,
    whole,
)
from utils.guidance.sens_merging.method import DISTANCES, LOSSES, OUTSIDE, SENSITIVITY, TENSORS
from utils.pair.config import PairConfig

SENSITIVITY_TABLE = TableFormat(
    SENSITIVITY, (expert("model"), whole("layer"), number("sensitivity")), key=("model", "layer")
)
DISTANCE_TABLE = TableFormat(
    DISTANCES, (expert("model"), expert("other"), number("distance"), whole("tokens", 1)), key=("model", "other")
)
TENSOR_TABLE = TableFormat(
    TENSORS,
    (text("tensor"), whole("layer", -1), text("component", blank=True), whole("params", 1)),
    key=("tensor",),
)
OUTSIDE_TABLE = TableFormat(
    OUTSIDE,
    (expert("model"), text("tensor"), text("tied_to", blank=True), number("sensitivity")),
    key=("model", "tensor"),
)
LOSS_TABLE = TableFormat(LOSSES, (expert("model"), whole("samples", 1), number("loss")))


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
        UserError: as `read_tables`; a row is missing, or one too many. All problems of the tables are in the one message.
    """
    known = [entry.type for entry in config.experts]
    tensors, sensitivities, distances = read_tables(folder, (TENSOR_TABLE, SENSITIVITY_TABLE, DISTANCE_TABLE), known)
    sensitivities = sensitivities[sensitivities["model"].isin(experts)]
    distances = distances[distances[["model", "other"]].isin(experts).all(axis=1)]
    blocks, problems = _depth(tensors)
    places = [(model, layer) for model in experts for layer in range(blocks)]
    pairs = [(model, other) for model in experts for other in experts if other != model]
    if not problems:
        problems += row_problems(SENSITIVITY_TABLE, sensitivities, places)
    problems += row_problems(DISTANCE_TABLE, distances, pairs)
    raise_collected(problems, f"dataframe folder {folder}")
    by_place = sensitivities.set_index(["model", "layer"])["sensitivity"]
    matrix = np.zeros((len(experts), len(experts)))
    for row in distances.itertuples():
        matrix[experts.index(row.model), experts.index(row.other)] = row.distance
    order = {name: place for place, name in enumerate([*filter(None, dict.fromkeys(tensors["component"])), ""])}
    return Sensitivity(
        by_place.loc[places].to_numpy().reshape(len(experts), blocks),
        matrix,
        tensors.sort_values(["component", "layer"], key=_ordered_by(order), kind="stable"),
    )


def read_outside(folder: Path, experts: Sequence[str], config: PairConfig, tensors: pd.DataFrame) -> pd.DataFrame:
    """The sensitivities of what lies outside the blocks, those of tied tensors once.

    Args:
        folder: the dataframe folder.
        experts: the types to merge.
        config: the pair config.
        tensors: the rows of `TENSOR_TABLE` of what lies outside.

    Returns:
        Columns `layer` (the name of the tensor that stands for the layer) and `tensor`, then one per expert.

    Raises:
        UserError: as `read_tables`; an earlier version measured, or a row is missing.
    """
    if not (folder / OUTSIDE).exists():
        raise UserError(
            f"--outside layers needs {OUTSIDE}, which is not in {folder}: an earlier version measured it; measure again "
            "with --overwrite, or leave --outside out",
            "outside-not-measured",
        )
    (table,) = read_tables(folder, [OUTSIDE_TABLE], [entry.type for entry in config.experts])
    table = table[table["model"].isin(experts)]
    wanted = [(model, tensor) for model in experts for tensor in tensors["tensor"]]
    raise_collected(row_problems(OUTSIDE_TABLE, table, wanted), f"dataframe folder {folder}")
    wide = table.pivot(index="tensor", columns="model", values="sensitivity")[list(experts)].reset_index()
    tied_to = dict(zip(table["tensor"], table["tied_to"], strict=True))
    wide.insert(0, "layer", [tied_to[tensor] or tensor for tensor in wide["tensor"]])
    return wide


def _depth(tensors: pd.DataFrame) -> tuple[int, list[Problem]]:
    """The number of blocks, and what is wrong with it: each component is in a block once, nothing lies deeper."""
    parts = tensors[tensors["component"] != ""]
    if parts.empty:
        problem = f"{TENSORS}: no row has a component; measure again with --overwrite"
        return 0, [Problem(problem, "table-row-missing")]
    blocks, deepest = int(parts["layer"].max()) + 1, int(tensors["layer"].max())
    problems = grid_problems(parts, TENSORS)
    problems += [
        Problem(f"{TENSORS}: component {name} cannot be at layer -1", "table-row-unexpected")
        for name in dict.fromkeys(parts.loc[parts["layer"] < 0, "component"])
    ]
    if deepest > blocks:
        message = f"{TENSORS}: layer {deepest}, but the components are of {blocks} blocks"
        problems.append(Problem(message, "table-row-missing"))
    return blocks, problems


def _ordered_by(order: Mapping[str, int]):
    return lambda column: column.map(order) if column.name == "component" else column
