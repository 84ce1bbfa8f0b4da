"""The tables of guidance `submodule_linearity` in the dataframe folder: their columns, and their reading.

| file | rows |
|---|---|
| `submodule_linearity_gram.csv` | level, part, task (`text`, the expert whose text it is) and pair of experts: mean per token of the inner product of what both change |
| `submodule_linearity_tensors.csv` | level, part and tensor, by its name in the checkpoint |
| `submodule_linearity_nonlinearity.csv` | level, part and expert: 0 is linear; no rows if it was not measured |

A part is a layer (-1 before the blocks, the number of blocks behind them) and a `submodule`. What lies outside the
blocks is recorded at level `tensor` and belongs to every level. The halves of a pair may come in either order, once.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import Problem, raise_collected
from utils.guidance.columns import TableFormat, expert, number, read_tables, text, whole
from utils.guidance.submodule_linearity.method import BLOCK, GRAM, LEVELS, SCORES, TENSOR, TENSORS

_PART = (text("level", names=LEVELS), whole("layer", -1), text("submodule"))
GRAM_TABLE = TableFormat(
    GRAM, (*_PART, expert("text"), expert("model"), expert("other"), number("value", least=-float("inf")))
)
TENSOR_TABLE = TableFormat(
    TENSORS,
    (*_PART, text("tensor"), text("component", blank=True), whole("params", 1)),
    key=("level", "layer", "submodule", "tensor"),
)
SCORE_TABLE = TableFormat(
    SCORES,
    (*_PART, expert("model"), number("score")),
    key=("level", "layer", "submodule", "model"),
    may_be_empty=True,
)
_OUTSIDE = TENSOR  # the level under which what lies outside the blocks is recorded
_DEPTH = BLOCK  # the level that has one part for each block

Place = tuple[int, str]  # layer, submodule


def read_tensors(folder: Path, level: str) -> pd.DataFrame:
    """The rows of one level and of what lies outside the blocks; `component` is "" for what is none.

    Raises:
        UserError: as `read_tables`; a layer is missing, a tensor is in two parts of the blocks.
    """
    (table,) = read_tables(folder, [TENSOR_TABLE], ())
    at_depth = table.loc[table["level"] == _DEPTH, "layer"]
    depth = int(at_depth.max()) + 1 if len(at_depth) else 0
    inside = table["layer"].between(0, depth - 1)
    chosen = table[table["level"] == np.where(inside, level, _OUTSIDE)]
    inside = inside[chosen.index]
    there = set(chosen.loc[inside, "layer"])
    problems = [
        Problem(f"level {level}: layer {layer} is missing", "table-row-missing")
        for layer in range(max(depth, 1))
        if layer not in there
    ]
    for tensor, rows in chosen.groupby("tensor", sort=False):
        if len(rows) > 1 and inside[rows.index].any():
            problems.append(Problem(f"{tensor} is there twice", "table-row-twice"))
        if rows["params"].nunique() > 1:
            problems.append(Problem(f"{tensor} has several sizes", "table-bad-value"))
    raise_collected(problems, str(folder / TENSORS))
    return chosen.reset_index(drop=True)


def read_grams(
    folder: Path, tensors: pd.DataFrame, types: Sequence[str], known: Sequence[str]
) -> dict[Place, np.ndarray]:
    """The Gram matrices of the parts in `tensors`.

    Args:
        folder: the dataframe folder.
        tensors: from `read_tensors`.
        types: the experts to merge, in order; they are the tasks too.
        known: every expert of the pair config.

    Returns:
        By part, G [task, expert, expert] float64, symmetric.

    Raises:
        UserError: as `read_tables`; a value is missing or given twice; an expert's product with itself is negative.
    """
    (table,) = read_tables(folder, [GRAM_TABLE], known)
    wanted = tensors[["level", "layer", "submodule"]].drop_duplicates()
    table = table.merge(wanted, on=["level", "layer", "submodule"])
    table = table[table[["text", "model", "other"]].isin(types).all(axis=1)]
    places = [table[column].map(list(types).index).to_numpy(dtype=int) for column in ("text", "model", "other")]
    found = {(row.layer, row.submodule): np.full((len(types),) * 3, np.nan) for row in wanted.itertuples()}
    problems = []
    for layer, submodule, task, one, other, value in zip(
        table["layer"], table["submodule"], *places, table["value"], strict=True
    ):
        gram = found[layer, submodule][task]
        what = f"layer {layer}, {submodule}, text {types[task]}, {types[one]} with {types[other]}"
        if one == other and value < 0:
            problems.append(Problem(f"{what}: {value} is below 0, as no square is", "table-bad-value"))
        elif not np.isnan(gram[one, other]):
            problems.append(Problem(f"{what} is there twice", "table-row-twice"))
        gram[one, other] = gram[other, one] = value
    for (layer, submodule), grams in found.items():
        for task, one, other in np.argwhere(np.isnan(grams))[:1]:
            what = f"layer {layer}, {submodule}, text {types[task]}, {types[one]} with {types[other]}"
            problems.append(Problem(f"{what} is missing", "table-row-missing"))
    raise_collected(problems, str(folder / GRAM))
    return found


def read_scores(folder: Path, known: Sequence[str]) -> pd.DataFrame:
    """The non-linearity scores; no rows if none were measured.

    Raises:
        UserError: as `read_tables`.
    """
    (table,) = read_tables(folder, [SCORE_TABLE], known)
    return table
