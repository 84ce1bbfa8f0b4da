"""The tables of guidance `submodule_linearity` in the dataframe folder: their columns, and their reading.

| file | rows |
|---|---|
| `submodule_linearity_gram.csv` | level, part, task (`text`, the expert whose text it is) and pair of experts: mean per token of the inner product of what both change |
| `submodule_linearity_tensors.csv` | level, part and tensor, by its name in the checkpoint |
| `submodule_linearity_nonlinearity.csv` | level, part and expert: 0 is linear; the whole model's under level `model`; no rows if it was not measured |
| `submodule_linearity_folds.csv` | as the first, for each `fold` of a text (`folds.py`) and with its `tokens` |
| `submodule_linearity_levels.csv` | layer, level and expert: the share of its change that the block's merge at that level `missed` (`level_fit.py`) |

A part is a layer (-1 before the blocks, the number of blocks behind them) and a `submodule`. What lies outside the
blocks is recorded at level `tensor` and belongs to every level. The halves of a pair may come in either order, once.
A folder without the last two, which earlier versions did not write, can be read for all but what they are for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import Problem, UserError, raise_collected
from utils.guidance.columns import TableFormat, expert, number, read_tables, text, whole
from utils.guidance.submodule_linearity.folds import FOLDS
from utils.guidance.submodule_linearity.method import (
    ATTENTION_MLP,
    BLOCK,
    FOLD_GRAMS,
    GRAM,
    LEVELS,
    MISSED,
    SCORES,
    TENSOR,
    TENSORS,
    WHOLE,
)

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
    (text("level", names=(*LEVELS, WHOLE)), *_PART[1:], expert("model"), number("score")),
    key=("level", "layer", "submodule", "model"),
    may_be_empty=True,
)
FOLD_TABLE = TableFormat(
    FOLD_GRAMS,
    (
        *_PART,
        expert("text"),
        whole("fold", below=FOLDS),
        whole("tokens", 1),
        expert("model"),
        expert("other"),
        number("value", least=-float("inf")),
    ),
    key=("level", "layer", "submodule", "text", "fold", "model", "other"),
)
MISSED_TABLE = TableFormat(
    MISSED,
    (whole("layer"), text("level", names=LEVELS), expert("model"), number("missed")),
    key=("layer", "level", "model"),
    may_be_empty=True,
)
_OUTSIDE = TENSOR  # the level under which what lies outside the blocks is recorded
_DEPTH = BLOCK  # the level that has one part for each block

Place = tuple[int, str]  # layer, submodule


def read_tensors(folder: Path, level: str | Sequence[str]) -> pd.DataFrame:
    """The rows of one level, or of each layer's own, and of what lies outside; `component` is "" for what is none.

    Raises:
        UserError: as `read_tables`; a layer is missing, a tensor is in two parts of the blocks.
    """
    (table,) = read_tables(folder, [TENSOR_TABLE], ())
    at_depth = table.loc[table["level"] == _DEPTH, "layer"]
    depth = int(at_depth.max()) + 1 if len(at_depth) else 0
    inside = table["layer"].between(0, depth - 1)
    levels = [level] * depth if isinstance(level, str) else list(level)
    if len(levels) != depth:
        raise UserError(
            f"{folder / MISSED} has {len(levels)} layers, {TENSORS} {depth}; measure again with --overwrite",
            "table-row-missing",
        )
    wanted = table["layer"].where(inside, -1).map(dict(enumerate(levels)) | {-1: _OUTSIDE})
    chosen = table[table["level"] == wanted]
    inside = inside[chosen.index]
    there = set(chosen.loc[inside, "layer"])
    problems = [
        Problem(f"level {levels[layer] if levels else level}: layer {layer} is missing", "table-row-missing")
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


@dataclass(frozen=True)
class FoldGrams:
    """Gram matrices fold by fold: `sums` over a fold's tokens by part, [tasks, folds, experts, experts] float64; `tokens`
    [tasks, folds], 0 where a task has no such fold."""

    sums: dict[Place, np.ndarray]
    tokens: np.ndarray


def read_folds(
    folder: Path, tensors: pd.DataFrame, types: Sequence[str], known: Sequence[str], grams: Mapping[Place, np.ndarray]
) -> FoldGrams | None:
    """The Gram matrices of the parts in `tensors`, fold by fold; None where an earlier version measured.

    Args:
        folder, tensors, types, known: as for `read_grams`.
        grams: from `read_grams`, which the folds have to add up to.

    Raises:
        UserError: as `read_tables`; a value is missing; folds do not add up.
    """
    if not (folder / FOLD_GRAMS).exists():
        return None
    (table,) = read_tables(folder, [FOLD_TABLE], known)
    table = table[table[["text", "model", "other"]].isin(types).all(axis=1)]
    wanted = tensors[["level", "layer", "submodule"]].drop_duplicates().reset_index(drop=True)
    table = table.merge(wanted.assign(part=wanted.index), on=["level", "layer", "submodule"])
    count = len(types)
    sums = np.full((len(wanted), count, FOLDS, count, count), np.nan)
    tokens = np.zeros((count, FOLDS))
    text, model, other = (table[name].map(list(types).index).to_numpy(int) for name in ("text", "model", "other"))
    part, fold = table["part"].to_numpy(int), table["fold"].to_numpy(int)
    value = table["value"].to_numpy() * table["tokens"].to_numpy()
    sums[part, text, fold, model, other] = sums[part, text, fold, other, model] = value
    tokens[text, fold] = table["tokens"].to_numpy()
    sums[:, tokens == 0] = 0.0
    for place, task, each in np.argwhere(np.isnan(sums).any(axis=(3, 4)))[:1]:
        what = f"layer {wanted['layer'][place]}, {wanted['submodule'][place]}, text {types[task]}, fold {each}"
        raise UserError(f"{folder / FOLD_GRAMS}: {what} is incomplete; measure again with --overwrite", _LOST)
    found = {(row.layer, row.submodule): sums[row.Index] for row in wanted.itertuples()}
    for place, own in found.items():
        mean = own.sum(axis=1) / np.maximum(tokens.sum(axis=1), 1)[:, None, None]
        if not np.allclose(mean, grams[place], rtol=1e-6, atol=1e-9 * np.abs(grams[place]).max(initial=0)):
            raise UserError(
                f"{folder / FOLD_GRAMS}: layer {place[0]}, {place[1]} does not add up to {GRAM}; edit both, or remove "
                f"{FOLD_GRAMS} (weights then have no intervals)",
                "table-other-sum",
            )
    return FoldGrams(found, tokens)


def read_best_levels(folder: Path, types: Sequence[str], known: Sequence[str]) -> pd.DataFrame:
    """What a merge of each block at each level misses on samples that its weights have not seen: layer x level, means.

    Args:
        folder: the dataframe folder.
        types: the experts to merge.
        known: every expert of the pair config.

    Raises:
        UserError: as `read_tables`; nothing of this was measured.
    """
    if not (folder / MISSED).exists():
        raise UserError(
            f"--level auto needs {MISSED}, which is not in {folder}: an earlier version measured it; measure again with "
            f"--overwrite, or give --level {ATTENTION_MLP}",
            "level-not-measured",
        )
    (table,) = read_tables(folder, [MISSED_TABLE], known)
    table = table[table["model"].isin(types)]
    wide = table.pivot_table(index="layer", columns="level", values="missed", aggfunc="mean")
    if table.empty or list(wide.index) != list(range(len(wide))) or wide.isna().any(axis=None):
        raise UserError(
            f"--level auto: {folder / MISSED} does not have every layer at every level (measured without "
            f"--nonlinearity, or on one sample a text); measure again with --overwrite, or give --level {ATTENTION_MLP}",
            "level-not-measured",
        )
    return wide[[level for level in LEVELS if level in wide]]


_LOST = "table-row-missing"
