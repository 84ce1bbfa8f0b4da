"""tuned's part of the dataframe folder, and its reading.

| file | one row per |
|---|---|
| `tuned_coefficients.csv` | expert and tensor of the base's checkpoint: `layer` (-1 outside the blocks), `component`, `params`, `coefficient` |
| `tuned_steps.csv` | step, task and `samples`, those stepped on (none from the last) or held out: mean `loss` (nats per token), the |
| | share of the gains that the step loses on what is held out, and whether it is the one that was kept |
| `tuned_start.yaml` | the recipe that was started from: merge method, shared parameters, weights, files of the experts (by names in |
| | the folder, or by whole paths of those elsewhere) and their SHA-256 |
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import yaml

from utils.errors import Problem, UserError, raise_collected
from utils.guidance.columns import TableFormat, expert, number, read_tables, text, whole
from utils.guidance.tuned.method import COEFFICIENTS, METHODS, STARTED_FROM, STEPS
from utils.guidance.tuned.start import Start
from utils.recipes.routers import BASE, MERGE
from utils.safe_yaml import read_yaml_mapping

SAMPLES = ("stepped", "held_out")
COEFFICIENT_TABLE = TableFormat(
    COEFFICIENTS,
    (
        expert("model"),
        whole("layer", -1),
        text("component", blank=True),
        text("tensor"),
        whole("params", 1),
        number("coefficient", least=-float("inf")),
    ),
    key=("model", "tensor"),
)
STEP_TABLE = TableFormat(
    STEPS,
    (
        whole("step"),
        expert("task"),
        text("samples", names=SAMPLES),
        number("loss"),
        number("share_lost", least=-float("inf")),
        whole("kept"),
    ),
    key=("step", "task", "samples"),
)


def start_content(start: Start) -> bytes:
    """What `tuned_start.yaml` holds of a start whose files are named as they are to be found from the folder."""
    return yaml.safe_dump(asdict(start), sort_keys=False).encode()


def read_tuned(folder: Path, experts: Sequence[str], known: Sequence[str]) -> tuple[pd.DataFrame, Start]:
    """Read and check the coefficients, and the start.

    Args:
        folder: the dataframe folder.
        experts: the types to merge, which must be those that were tuned together.
        known: every type of the pair config.

    Raises:
        UserError: a file is missing or malformed; other experts were tuned, or not the same tensors of each.
    """
    (table,) = read_tables(folder, [COEFFICIENT_TABLE], known)
    start = _read_start(folder / STARTED_FROM)
    tuned = list(dict.fromkeys(table["model"]))
    if sorted(tuned) != sorted(experts) or sorted(start.weights) != sorted(experts):
        raise UserError(
            f"dataframe folder {folder}: the coefficients of {', '.join(tuned)} were tuned together and hold for these "
            f"alone, not for {', '.join(experts)}; measure again with this config",
            "tuned-other-experts",
        )
    first = table.loc[table["model"] == experts[0], "tensor"].tolist()
    problems = [
        Problem(f"{COEFFICIENTS}: {name} and {experts[0]} have other tensors; measure again", "table-row-missing")
        for name in experts
        if table.loc[table["model"] == name, "tensor"].tolist() != first
    ]
    raise_collected(problems, f"dataframe folder {folder}")
    return table, start


def _read_start(path: Path) -> Start:
    data: Mapping = read_yaml_mapping(path, "tuned recipe's start")
    try:
        weights = {str(key): float(value) for key, value in data["weights"].items()}
        named = {str(key): str(value) for key, value in data["saliency"].items()}
        saliency = {key: os.path.abspath(path.parent / file) for key, file in named.items()}
        sha256 = {str(key): str(value) for key, value in data["sha256"].items()}
        routers = tuple(str(text) for text in data.get("routers", ()))
        unmeasured = tuple((str(text), bool(has)) for text, has in data.get("unmeasured", ()))
        shared, router = dict(data["parameters"]), data.get("router")
        found = Start(str(data["merge_method"]), shared, weights, saliency, sha256, routers, router, unmeasured)
        if router not in (None, BASE, MERGE):
            raise ValueError(router)
        if found.merge_method not in METHODS or not saliency.keys() == sha256.keys() <= weights.keys():
            raise ValueError(found.merge_method)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not as tuning writes it ({error}); measure again", "tuned-start-damaged") from error
    return found
