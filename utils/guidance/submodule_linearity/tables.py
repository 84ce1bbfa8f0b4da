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

from utils.errors import UserError, raise_collected
from utils.guidance.folder import read_csv, read_table
from utils.guidance.submodule_linearity.method import BLOCK, GRAM, LEVELS, SCORES, TENSOR, TENSORS

GRAM_COLUMNS = ("level", "layer", "submodule", "text", "model", "other", "value")
TENSORS_COLUMNS = ("level", "layer", "submodule", "tensor", "component", "params")
SCORES_COLUMNS = ("level", "layer", "submodule", "model", "score")
_OUTSIDE = TENSOR  # the level under which what lies outside the blocks is recorded
_DEPTH = BLOCK  # the level that has one part for each block

Place = tuple[int, str]  # layer, submodule


def read_tensors(folder: Path, level: str) -> pd.DataFrame:
    """The rows of one level and of what lies outside the blocks; `component` is "" for what is none.

    Raises:
        UserError: the file is missing or malformed, a layer is missing, a tensor is in two parts of the blocks.
    """
    table = read_table(folder, TENSORS, TENSORS_COLUMNS)
    where = str(folder / TENSORS)
    table["component"] = table["component"].fillna("")
    problems = _unknown(table, "level", LEVELS)
    for column in ("submodule", "tensor", "component"):
        if not all(isinstance(value, str) for value in table[column]):
            problems.append(f"a {column} is missing")
    for column, least in (("layer", -1), ("params", 1)):
        problems += _not_whole(table, column, least)
    raise_collected(problems, where)
    depth = table.loc[table["level"] == _DEPTH, "layer"].max() + 1
    inside = (table["layer"] >= 0) & (table["layer"] < depth)
    chosen = table[(inside & (table["level"] == level)) | (~inside & (table["level"] == _OUTSIDE))]
    there = set(table.loc[inside & (table["level"] == level), "layer"])
    lost = sorted(set(range(int(depth) if depth == depth else 1)) - there)
    problems += [f"level {level}: layer {layer} is missing" for layer in lost[:5]]
    for tensor, rows in chosen.groupby("tensor", sort=False):
        if rows.duplicated(["layer", "submodule"]).any() or (
            len(rows) > 1 and rows["layer"].isin(range(len(there))).any()
        ):
            problems.append(f"{tensor} is there twice")
        if rows["params"].nunique() > 1:
            problems.append(f"{tensor} has several sizes")
    raise_collected(problems, where)
    return chosen.astype({"layer": int, "params": int}).reset_index(drop=True)


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
        UserError: the file is missing or malformed; a type is unknown; a value is missing, given twice or not finite; an
            expert's product with itself is negative.
    """
    table = read_table(folder, GRAM, GRAM_COLUMNS)
    where = str(folder / GRAM)
    problems = _unknown(table, "level", LEVELS) + _not_whole(table, "layer", -1)
    for column in ("text", "model", "other"):
        problems += _unknown(table, column, known, "belongs to no expert of the config")
    raise_collected(problems, where)
    table["layer"] = table["layer"].astype(int)
    wanted = tensors[["level", "layer", "submodule"]].drop_duplicates()
    table = table.merge(wanted, on=["level", "layer", "submodule"])
    table = table[table[["text", "model", "other"]].isin(types).all(axis=1)]
    values = pd.to_numeric(table["value"], errors="coerce").to_numpy(dtype="float64")
    number = {name: place for place, name in enumerate(types)}
    indices = [table[column].map(number).to_numpy(dtype=int) for column in ("text", "model", "other")]
    found = {(row.layer, row.submodule): np.full((len(types),) * 3, np.nan) for row in wanted.itertuples()}
    for layer, submodule, task, one, other, value in zip(
        table["layer"], table["submodule"], *indices, values, strict=True
    ):
        gram = found[layer, submodule][task]
        what = f"layer {layer}, {submodule}, text {types[task]}, {types[one]} with {types[other]}"
        if not np.isfinite(value) or (one == other and value < 0):
            problems.append(f"{what}: {value} is no finite number" + (" of at least 0" if one == other else ""))
        elif np.isfinite(gram[one, other]):
            problems.append(f"{what} is there twice")
        else:
            gram[one, other] = gram[other, one] = value
    if not problems:
        for (layer, submodule), grams in found.items():
            for task, one, other in np.argwhere(np.isnan(grams))[:1]:
                problems.append(
                    f"layer {layer}, {submodule}, text {types[task]}, {types[one]} with {types[other]} is missing"
                )
    raise_collected(problems, where)
    return found


def read_scores(folder: Path, known: Sequence[str]) -> pd.DataFrame:
    """The non-linearity scores; no rows if none were measured.

    Raises:
        UserError: the file is missing or malformed, a type is unknown, a score is given twice, not finite or negative.
    """
    path = folder / SCORES
    if not path.is_file():
        raise UserError(f"{path} is missing; run lewis_importance.py with this config and guidance first")
    table = read_csv(path)
    if list(table.columns) != list(SCORES_COLUMNS):
        raise UserError(f"{path}: columns must be {','.join(SCORES_COLUMNS)}, got {','.join(map(str, table.columns))}")
    if table.empty:
        return table
    problems = _unknown(table, "level", LEVELS) + _not_whole(table, "layer", -1)
    problems += _unknown(table, "model", known, "belongs to no expert of the config")
    scores = pd.to_numeric(table["score"], errors="coerce")
    if not ((scores >= 0) & (scores < float("inf"))).all():
        problems.append("a score is no finite number of at least 0")
    if table.duplicated(["level", "layer", "submodule", "model"]).any():
        problems.append("a score is there twice")
    raise_collected(problems, str(path))
    return table.assign(score=scores.astype("float64"), layer=table["layer"].astype(int))


def _unknown(table: pd.DataFrame, column: str, known: Sequence[str], why: str = "is unknown") -> list[str]:
    return [f"{column} {value!r} {why}" for value in table[column].unique().tolist() if value not in known]


def _not_whole(table: pd.DataFrame, column: str, least: int) -> list[str]:
    values = pd.to_numeric(table[column], errors="coerce")
    bad = table.loc[~((values >= least) & (values < 2**53) & (values % 1 == 0)), column]
    return [f"{column} {value!r} is no whole number of at least {least}" for value in bad.unique().tolist()[:3]]
