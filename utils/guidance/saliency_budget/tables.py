"""The saliency budget's part of the dataframe folder, and its reading.

| file | one row per |
|---|---|
| `saliency_budget_tensors.csv` | expert and measured tensor (its name in the base's checkpoint): `layer`, `component`, `params`; |
| | `changed` entries; `zeros`, the entries without saliency; `delta_norm`, the norm of the change; `explained`, the share of the |
| | variance of log F that its two vectors explain. The last one is for people, not read again |
| `saliency_budget_histogram.csv` | expert, tensor and bin that is not empty: `count` of entries (`utils/guidance/saliency_budget/histograms.py`) |
| `<type>_saliency.safetensors` | expert: one vector per axis of F of every parameter (`utils/recipes/saliency_vectors.py`) |

`saliency_power` among the manifest's `guidance_options` is the exponent of F in the saliencies that were counted; a folder
without it has counted by 1. The vectors are of F itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from utils.errors import UserError, raise_collected
from utils.guidance.folder import read_table
from utils.guidance.saliency_budget.bins import BINS
from utils.guidance.saliency_budget.method import HISTOGRAM, TENSORS, vector_file
from utils.pair.config import PairConfig
from utils.recipes.saliency_vectors import open_vectors

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS: Mapping[str, tuple[str, ...]] = {
    TENSORS: ("model", "layer", "component", "tensor", "params", "changed", "zeros", "delta_norm", "explained"),
    HISTOGRAM: ("model", "tensor", "bin", "count"),
}
_WHOLE = {TENSORS: ("layer", "params", "changed", "zeros"), HISTOGRAM: ("bin", "count")}


@dataclass(frozen=True)
class ExpertSaliency:
    """What was measured of one expert, checked.

    `tensors` has the columns of its file, ordered by component, then layer; `counts` (int64 [tensors, bins]) and
    `zeros` (int64 [tensors]) are the histograms in that order.
    """

    tensors: pd.DataFrame
    counts: np.ndarray
    zeros: np.ndarray


def read_saliency(folder: Path, experts: Sequence[str], config: PairConfig) -> dict[str, ExpertSaliency]:
    """Read and check the tables.

    Args:
        folder: the dataframe folder.
        experts: the types to merge.
        config: the pair config, which may know further experts, and may name components.

    Returns:
        By expert, in the order asked for.

    Raises:
        UserError: a file is missing or malformed; rows are missing, given twice, or of no expert of the config; other
            components than the config's; a value is not a number of its kind; histograms that do not add up. All
            problems are in the one message.
    """
    tables = {  # no bin has an entry where no expert differs from the base
        name: read_table(folder, name, columns, may_be_empty=name == HISTOGRAM) for name, columns in COLUMNS.items()
    }
    problems = []
    known = {entry.type for entry in config.experts}
    for name, table in tables.items():
        tables[name] = table = table.assign(model=table["model"].astype(str), tensor=table["tensor"].astype(str))
        strangers = sorted(set(table["model"]) - known)
        problems += [f"{name}: {model!r} is no expert of the config" for model in strangers]
        problems += _number_problems(table, name)
    raise_collected(problems, f"dataframe folder {folder}")
    for name, table in tables.items():
        tables[name] = table.astype(dict.fromkeys(_WHOLE[name], "int64"))
    parts = {model: {name: table[table["model"] == model] for name, table in tables.items()} for model in experts}
    for model, part in parts.items():
        problems += _tensor_problems(part[TENSORS], model, config.components)
        problems += _histogram_problems(part[TENSORS], part[HISTOGRAM], model)
    if not problems:
        problems += _differences({model: part[TENSORS] for model, part in parts.items()})
    raise_collected(problems, f"dataframe folder {folder}")
    return {model: _expert(part[TENSORS], part[HISTOGRAM]) for model, part in parts.items()}


def read_vectors_of(
    folder: Path, model: str, names: Mapping[str, str], power: float
) -> "dict[str, tuple[Tensor, ...]]":
    """An expert's vectors, of F^power.

    Args:
        folder: the dataframe folder.
        model: the expert's type.
        names: what to call each tensor, by the name it was measured under.
        power: above 0.

    Returns:
        float64, by the new names.

    Raises:
        UserError: the file is missing, malformed, or lacks a tensor.
    """
    vectors = open_vectors(folder / vector_file(model))
    return {
        called: tuple(axis.double().pow(power) for axis in vectors.vectors(tensor)) for tensor, called in names.items()
    }


def read_vector_file(folder: Path, model: str, tensors: Sequence[str]) -> bytes:
    """The content of an expert's file of vectors, as it is.

    Args:
        folder: the dataframe folder.
        model: the expert's type.
        tensors: names that must be in it.

    Raises:
        UserError: the file is missing, malformed, or lacks a tensor.
    """
    vectors = open_vectors(folder / vector_file(model))
    for tensor in tensors:
        vectors.shape(tensor)
    vectors.check_all()
    return vectors.path.read_bytes()


def read_power(manifest: Mapping[str, Any] | None) -> float:
    """The exponent of F in the saliencies that were counted.

    Raises:
        UserError: the manifest has something else there.
    """
    options = (manifest or {}).get("guidance_options")
    power = options.get("saliency_power", 1.0) if isinstance(options, dict) else 1.0
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 < power <= 1:
        raise UserError(
            f"manifest.json: guidance_options.saliency_power is {power!r}, not a number above 0 and at most 1; measure "
            "again with --overwrite"
        )
    return float(power)


def _number_problems(table: pd.DataFrame, name: str) -> list[str]:
    """Columns with values that are no whole numbers of at least 0, the first of each."""
    problems = []
    for column in _WHOLE[name]:
        values = pd.to_numeric(table[column], errors="coerce").astype("float64")
        low = 1 if column in ("params", "count") else 0
        bad = ~((values >= low) & (values < 2**53) & (values == values.round()))
        if column == "bin":
            bad |= values >= BINS
        if bad.any():
            row = table.loc[bad.idxmax()]
            where = f"{name}: model {row['model']}, {row['tensor']}"
            kind = f"below {BINS}" if column == "bin" else f"of at least {low}"
            problems.append(f"{where}: {column} is {row[column]}, not a whole number {kind} ({bad.sum()} such rows)")
    return problems


def _tensor_problems(table: pd.DataFrame, model: str, components: Sequence[str] | None) -> list[str]:
    """Every component must be there once in each layer, and the components must be the config's if it names them."""
    where = f"{TENSORS}: model {model}"
    if table.empty:
        return [f"{where} has no rows; measure again with this config"]
    problems = [f"{where}: {name} is there twice" for name in table["tensor"][table["tensor"].duplicated()]]
    counts = table.groupby(["component", "layer"]).size()
    found = list(dict.fromkeys(table["component"].astype(str)))
    for component in found:
        for layer in range(int(table["layer"].max()) + 1):
            if (rows := counts.get((component, layer), 0)) != 1:
                problems.append(f"{where}: {rows} rows for layer {layer}, component {component}; there must be one")
    if components is not None and set(components) != set(found):
        problems.append(
            f"{where} has the components {', '.join(found)}, but the config asks for {', '.join(components)}; measure "
            "again with this config"
        )
    return problems


def _histogram_problems(tensors: pd.DataFrame, histogram: pd.DataFrame, model: str) -> list[str]:
    where = f"{HISTOGRAM}: model {model}"
    problems = [
        f"{where}: {name} is not in {TENSORS}" for name in sorted(set(histogram["tensor"]) - set(tensors["tensor"]))
    ]
    twice = histogram[histogram.duplicated(["tensor", "bin"])]
    problems += [f"{where}: {row.tensor}: bin {row.bin} is there twice" for row in twice.itertuples()]
    sums = histogram.groupby("tensor")["count"].sum()
    for row in tensors.itertuples():
        counted = int(sums.get(row.tensor, 0))
        if counted + row.zeros != row.params:
            problems.append(
                f"{where}: {row.tensor} has {counted} entries in bins and {row.zeros} without saliency, but {row.params} "
                "params: rows are missing"
            )
    return problems


def _differences(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Experts that were not measured on the same tensors."""
    first, *others = tables
    keys = ["component", "layer", "tensor", "params"]
    sorted_first = tables[first][keys].sort_values(keys).reset_index(drop=True)
    return [
        f"{TENSORS}: {first} and {other} were not measured on the same tensors; measure both with the same config"
        for other in others
        if not tables[other][keys].sort_values(keys).reset_index(drop=True).equals(sorted_first)
    ]


def _expert(tensors: pd.DataFrame, histogram: pd.DataFrame) -> ExpertSaliency:
    order = {name: place for place, name in enumerate(dict.fromkeys(tensors["component"]))}
    tensors = tensors.assign(place=tensors["component"].map(order)).sort_values(["place", "layer"])
    tensors = tensors.drop(columns="place").reset_index(drop=True)
    rows = {name: row for row, name in enumerate(tensors["tensor"])}
    counts = np.zeros((len(tensors), BINS), dtype=np.int64)
    counts[histogram["tensor"].map(rows).to_numpy(np.int64), histogram["bin"].to_numpy()] = histogram[
        "count"
    ].to_numpy()
    return ExpertSaliency(tensors, counts, tensors["zeros"].to_numpy())
