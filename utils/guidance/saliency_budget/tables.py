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

from utils.errors import Problem, UserError, raise_collected
from utils.guidance.columns import TableFormat, expert, grid_problems, number, read_tables, text, whole
from utils.guidance.csv_files import csv_bytes
from utils.guidance.saliency_budget.bins import BINS
from utils.guidance.saliency_budget.method import HISTOGRAM, TENSORS, vector_file
from utils.pair.config import PairConfig
from utils.recipes.saliency_vectors import open_vectors

if TYPE_CHECKING:
    from torch import Tensor

TENSOR_TABLE = TableFormat(
    TENSORS,
    (
        expert("model"),
        whole("layer"),
        text("component"),
        text("tensor"),
        whole("params", 1),
        whole("changed"),
        whole("zeros"),
        number("delta_norm"),
        number("explained", least=-float("inf")),
    ),
    key=("model", "tensor"),
)
HISTOGRAM_TABLE = TableFormat(
    HISTOGRAM,
    (expert("model"), text("tensor"), whole("bin", below=BINS), whole("count", 1)),
    key=("model", "tensor", "bin"),
    may_be_empty=True,  # no bin has an entry where no expert differs from the base
)


@dataclass(frozen=True)
class ExpertSaliency:
    """What was measured of one expert, checked.

    `tensors` has the columns of its file, ordered by component, then layer; `counts` (int64 [tensors, bins]) and
    `zeros` (int64 [tensors]) are the histograms in that order.
    """

    tensors: pd.DataFrame
    counts: np.ndarray
    zeros: np.ndarray


def histogram_content(bins: "Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]") -> bytes:
    """The file of histograms.

    Args:
        bins: by expert and tensor, the numbers of the bins that are not empty, and the counts of entries in them.
    """
    parts = [(model, tensor, *pair) for model, tensors in bins.items() for tensor, pair in tensors.items()]
    lengths = [len(numbers) for _, _, numbers, _ in parts]
    names = [np.repeat(np.array([part[place] for part in parts], dtype=object), lengths) for place in (0, 1)]
    values = [np.concatenate([np.zeros(0, np.int64), *(part[place].numpy() for part in parts)]) for place in (2, 3)]
    return csv_bytes(pd.DataFrame(dict(zip(HISTOGRAM_TABLE.names, [*names, *values], strict=True))))


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
    read = read_tables(folder, (TENSOR_TABLE, HISTOGRAM_TABLE), [entry.type for entry in config.experts])
    parts = {model: tuple(table[table["model"] == model] for table in read) for model in experts}
    problems = []
    for model, (tensors, histogram) in parts.items():
        problems += _tensor_problems(tensors, model, config.components)
        problems += _histogram_problems(tensors, histogram, model)
    if not problems:
        problems += _differences({model: tensors for model, (tensors, _) in parts.items()})
    raise_collected(problems, f"dataframe folder {folder}")
    return {model: _expert(*part) for model, part in parts.items()}


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
            "again with --overwrite",
            "manifest-value",
        )
    return float(power)


def _tensor_problems(table: pd.DataFrame, model: str, components: Sequence[str] | None) -> list[Problem]:
    """A component may be there once in a layer, and the components must be the config's if it names them."""
    where = f"{TENSORS}: model {model}"
    if table.empty:
        return [Problem(f"{where} has no rows; measure again with this config", "table-row-missing")]
    problems = grid_problems(table, where)
    found = list(dict.fromkeys(table["component"]))
    if components is not None and set(components) != set(found):
        message = (
            f"{where} has the components {', '.join(found)}, but the config asks for {', '.join(components)}; measure "
            "again with this config"
        )
        problems.append(Problem(message, "dataframes-other-config"))
    return problems


def _histogram_problems(tensors: pd.DataFrame, histogram: pd.DataFrame, model: str) -> list[Problem]:
    where = f"{HISTOGRAM}: model {model}"
    problems = [
        Problem(f"{where}: {name} is not in {TENSORS}", "table-row-unexpected")
        for name in sorted(set(histogram["tensor"]) - set(tensors["tensor"]))
    ]
    sums = histogram.groupby("tensor")["count"].sum()
    for row in tensors.itertuples():
        counted = int(sums.get(row.tensor, 0))
        if counted + row.zeros != row.params:
            message = (
                f"{where}: {row.tensor} has {counted} entries in bins and {row.zeros} without saliency, but {row.params} "
                "params: rows are missing"
            )
            problems.append(Problem(message, "table-row-missing"))
    return problems


def _differences(tables: Mapping[str, pd.DataFrame]) -> list[Problem]:
    """Experts that were not measured on the same tensors."""
    first, *others = tables
    keys = ["component", "layer", "tensor", "params"]
    sorted_first = tables[first][keys].sort_values(keys).reset_index(drop=True)
    return [
        Problem(
            f"{TENSORS}: {first} and {other} were not measured on the same tensors; measure both with the same config",
            "dataframes-other-config",
        )
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
