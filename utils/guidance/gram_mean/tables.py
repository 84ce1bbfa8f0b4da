"""gram_mean's part of the dataframe folder, and its reading.

| file | one row per |
|---|---|
| `gram_mean_tensors.csv` | expert and linear layer whose inputs were measured: `layer`, `component`, `tensor` (its name in the base's |
| | checkpoint), `params`; `channels` of its inputs, and the `tokens` that came (of a mixture's expert those routed to it) |
| `gram_mean_losses.csv` | expert and sample: `tokens` predicted, losses at base and expert (nats per token) |
| `<type>_grams.safetensors` | expert: vectors and Gram matrices (`utils/recipes/gram_file.py`) |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.errors import Problem, raise_collected
from utils.guidance.columns import TableFormat, expert, grid_problems, number, read_tables, text, whole
from utils.guidance.gram_mean.method import LOSSES, TENSORS, gram_file
from utils.guidance.text_gain import TextGain, text_gain
from utils.recipes.gram_file import misfit
from utils.recipes.saliency_vectors import open_vectors

TENSOR_TABLE = TableFormat(
    TENSORS,
    (
        expert("model"),
        whole("layer"),
        text("component"),
        text("tensor"),
        whole("params", 1),
        whole("channels", 1),
        whole("tokens"),
    ),
    key=("model", "tensor"),
)
LOSS_TABLE = TableFormat(
    LOSSES,
    (expert("model"), whole("sample"), whole("tokens", 1), number("base_loss"), number("expert_loss")),
    key=("model", "sample"),
)


@dataclass(frozen=True)
class MeasuredGrams:
    """What was measured of some experts, checked: `tensors` with the columns of its file, and each one's gain."""

    tensors: pd.DataFrame
    gains: dict[str, TextGain]


def read_grams(folder: Path, experts: Sequence[str], known: Sequence[str]) -> MeasuredGrams:
    """Read and check the tables, and hold the files' headers against them.

    Args:
        folder: the dataframe folder.
        experts: the types to merge.
        known: every type of the pair config.

    Raises:
        UserError: a file is missing or malformed; an expert has no rows, or other tensors than the first; a tensor is
            not in the expert's file, or does not fit it. All problems of a kind are in one message.
    """
    tensors, losses = read_tables(folder, (TENSOR_TABLE, LOSS_TABLE), known)
    keys = ["layer", "component", "tensor", "params"]
    first = tensors[tensors["model"] == experts[0]][keys].reset_index(drop=True)
    problems: list[Problem] = []
    for name in experts:
        own = tensors[tensors["model"] == name]
        for table, file in ((own, TENSORS), (losses[losses["model"] == name], LOSSES)):
            if table.empty:
                problems.append(
                    Problem(f"{file} has no rows of {name}; measure again with this config", "grams-absent")
                )
        if not own.empty:
            problems += grid_problems(own, f"{TENSORS}: model {name}")
        if not own.empty and not own[keys].reset_index(drop=True).equals(first):
            words = f"{TENSORS}: {experts[0]} and {name} were not measured on the same tensors; measure both again"
            problems.append(Problem(words, "grams-differ"))
    raise_collected(problems, f"dataframe folder {folder}")
    problems = [found for name in experts for found in _file_problems(folder, name, tensors[tensors["model"] == name])]
    raise_collected(problems, f"dataframe folder {folder}")
    gains = {}
    for name in experts:
        rows = losses[losses["model"] == name]
        gains[name] = text_gain(*(rows[key].tolist() for key in ("tokens", "base_loss", "expert_loss")))
    return MeasuredGrams(tensors[tensors["model"].isin(experts)], gains)


def _file_problems(folder: Path, model: str, table: pd.DataFrame) -> list[Problem]:
    """What of an expert's file does not agree with its table, from the header."""
    file, found = open_vectors(folder / gram_file(model)), []
    for row in table.itertuples():
        shape = file.shape(row.tensor)
        if wrong := misfit(file, row.tensor, shape):
            found.append(Problem(f"{gram_file(model)}: {wrong}; measure again", "grams-misfit"))
        elif row.channels not in shape or shape[0] * shape[-1] != row.params:
            words = f"{gram_file(model)}: {row.tensor} is {list(shape)}, in {TENSORS} it has {row.params} params"
            found.append(Problem(f"{words} and {row.channels} channels; measure again", "grams-misfit"))
    return found
