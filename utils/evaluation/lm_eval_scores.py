"""Accuracy with lm-eval: its tasks by name or from YAML files, one candidate's weights in memory at a time.

Per-sample results are kept, so that candidates are compared question by question (exact McNemar). lm-eval's own response
cache is not used: its key leaves the model out.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from utils.errors import UserError, brief
from utils.evaluation.lm_eval_code import code_in, nodes_of, runs_templates_in_a_sandbox
from utils.evaluation.lm_eval_digest import task_digest
from utils.evaluation.statistics import mcnemar_exact
from utils.evaluation.whole_models import WholeModel
from utils.publishing.manifest import sha256_of

OLDEST = (0, 4, 13)
INSTALL = "pip install -r requirements-eval.txt"
COLUMNS = ("candidate", "task", "metric", "filter", "doc", "prompt", "value")
FIGURES = ("candidate", "task", "metric", "filter", "value", "higher_is_better", "share")


@dataclass(frozen=True)
class AccuracyTasks:
    """The tasks of lm-eval's that were asked for, and those among them that run code.

    `asked` and `confirmed` are what they were found by, for another process to find them by. `digest` is the SHA-256 of what decides their results beside the model (`task_digest`).
    """

    names: tuple[str, ...]
    manager: Any
    unsafe: tuple[str, ...]
    digest: str
    asked: tuple[str, ...] = ()
    confirmed: bool = False


@dataclass(frozen=True)
class Accuracy:
    """What candidates come to on lm-eval's tasks: the numbers of every sample (`COLUMNS`) and the tasks' figures
    (`FIGURES`), each put together from the samples as its task says; `share` where that is the mean of numbers from 0 to 1.
    """

    samples: pd.DataFrame
    figures: pd.DataFrame


def require_lm_eval() -> None:
    """Raise a `UserError` with the line that installs lm-eval unless it is there and new enough."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"evaluation.*.lm_eval needs lm-eval, which is not installed: {INSTALL}", "lm-eval-missing")
    found = metadata.version("lm_eval")
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST:
        raise UserError(f"lm-eval {found} is installed; 0.4.13 or newer is needed: {INSTALL}", "lm-eval-version")


def find_tasks(asked: Sequence[str], confirmed: bool) -> AccuracyTasks:
    """Find tasks by name or YAML file and load their data; no model is needed yet.

    Args:
        asked: names of lm-eval's, or YAML files that hold a `task`.
        confirmed: whether tasks may run code that models write.

    Raises:
        UserError: lm-eval is missing; a task is unknown, has no data, or runs code, its own or models', unconfirmed.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    names, folders, files = [], [], {}
    for text in dict.fromkeys(asked):
        path = Path(os.path.expanduser(text))
        if path.suffix in (".yaml", ".yml"):
            names.append(_task_name(path))
            folders.append(str(path.resolve().parent))
            files[names[-1]] = path.resolve()
        else:
            names.append(text)
    with _quiet():
        # reading lm-eval's own tasks, some ten thousand files, takes half a minute
        by_name = len(folders) < len(names)
        manager = TaskManager(include_path=list(dict.fromkeys(folders)) or None, include_defaults=by_name)
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            raise UserError(
                f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, your own is a YAML file",
                "lm-eval-unknown-task",
            )
        _refuse_others(files, manager.task_index)
        if not confirmed and (code := next(code_in(names, manager.task_index), "")):
            raise UserError(
                f"lm-eval task {code}: that runs code on this machine. Give --confirm_run_unsafe_code if it is code that you "
                "trust",
                "lm-eval-unsafe-code",
            )
        runs_templates_in_a_sandbox()
        try:
            loaded = manager.load(names)["tasks"]
            digest = sha256_of([metadata.version("lm_eval"), names, [task_digest(task) for task in loaded.values()]])
        except Exception as error:  # data sets, the hub, YAML tags and task code fail in ways of their own
            raise UserError(
                f"lm-eval cannot load {', '.join(names)}: {brief(error)}. Its own tasks fetch their data from the hub: load "
                "them once with a network (HF_HUB_OFFLINE unset), or give a YAML file whose data lie here, such as those in "
                "utils/evaluation/accuracy",
                "lm-eval-no-data",
            ) from error
    unsafe = tuple(name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False))
    if unsafe and not confirmed:
        raise UserError(
            f"lm-eval task {', '.join(unsafe)} runs code that models write, on this machine: give "
            "--confirm_run_unsafe_code if that is meant, best in a container",
            "lm-eval-unsafe-code",
        )
    return AccuracyTasks(tuple(names), manager, unsafe, digest, tuple(asked), confirmed)


def _task_name(path: Path) -> str:
    """The name of the task in a YAML file, whose values are not made: lm-eval has tags of its own (`!function`).

    Raises:
        UserError: there is no such file, it is not YAML, or it names no task.
    """
    node = nodes_of(path)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    names = [value.value for key, value in pairs if key.value == "task" and isinstance(value, yaml.ScalarNode)]
    if not names:
        raise UserError(f"lm-eval task {path} names no task: give it a line `task: NAME`", "lm-eval-no-name")
    return names[0]


def _refuse_others(files: Mapping[str, Path], index: Mapping[str, Any]) -> None:
    """Raise a `UserError` if another file beside one that was asked for is taken in its place: lm-eval takes the first of a name."""
    for name, path in files.items():
        taken = index[name].yaml_path
        if taken is not None and taken.resolve() != path:
            raise UserError(
                f"lm-eval task {path} is named {name}, as {taken} is, which lm-eval takes: give it another name",
                "lm-eval-name-twice",
            )


def accuracy(name: str, whole: WholeModel, tasks: AccuracyTasks, batch_size: int, limit: int | None = None) -> Accuracy:
    """One candidate's results.

    `doc` and `prompt` are lm-eval's hashes of the document and of the prompt. Seeds are lm-eval's own defaults.

    Args:
        name: the candidate's.
        whole: its model and the tokenizer that is handed over.
        tasks: what `find_tasks` gave.
        batch_size: prompts at a time.
        limit: most documents of a task.

    Raises:
        UserError: the GPU has no room for so many prompts at a time.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _without_git():
        model = HFLM(pretrained=whole.model, tokenizer=whole.tokenizer, backend="causal", batch_size=batch_size)
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                confirm_run_unsafe_code=bool(tasks.unsafe),
            )
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"{name}: the GPU has no room for {batch_size} prompts of lm-eval's at a time; lower --lm_eval_batch",
                "device-out-of-memory",
            ) from error
    rows = [
        (name, task, metric, sample["filter"], sample["doc_hash"], sample["prompt_hash"], float(sample[metric]))
        for task, samples in found["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
        if isinstance(sample[metric], (bool, int, float))
    ]
    samples = pd.DataFrame(rows, columns=list(COLUMNS))
    return Accuracy(samples, pd.DataFrame(_figures(name, found, samples), columns=list(FIGURES)))


def _figures(name: str, found: Mapping[str, Any], samples: pd.DataFrame) -> Iterator[tuple]:
    """The figures of every task that samples were logged of, as lm-eval put them together."""
    values = {key: part["value"] for key, part in samples.groupby(["task", "metric", "filter"], sort=False)}
    for task in found["samples"]:
        for key, value in found["results"][task].items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (bool, int, float)):
                continue
            own = values.get((task, metric, filtered))
            share = own is not None and own.between(0, 1).all() and math.isclose(own.mean(), value, abs_tol=1e-9)
            higher = found["higher_is_better"].get(task, {}).get(metric, True)
            yield name, task, metric, filtered, float(value), bool(higher), bool(share)


def joined(found: Sequence[Accuracy]) -> Accuracy:
    """Several candidates' results as one; a metric's figures are shares if they are of all candidates, so that they have one
    unit."""
    samples, figures = (
        pd.concat([getattr(one, name) for one in found], ignore_index=True) for name in ("samples", "figures")
    )
    share = figures.groupby(["task", "metric", "filter"])["share"].transform("all")
    return Accuracy(samples, figures.assign(share=share))


def compare(table: pd.DataFrame, name: str, other: str) -> dict[tuple[str, str, str], float]:
    """Exact McNemar p-values between two candidates by task, metric and filter, for metrics that are right or wrong.

    Samples are paired by document and prompt; those that only one has are left out.
    """
    found = {}
    for key, part in table.groupby(["task", "metric", "filter"], sort=False):
        sides = [
            part[part["candidate"] == one].drop_duplicates(["doc", "prompt"]).set_index(["doc", "prompt"])["value"]
            for one in (name, other)
        ]
        both = pd.concat(sides, axis=1, join="inner").to_numpy()
        if both.size and set(both.ravel()) <= {0.0, 1.0}:
            first, second = both[:, 0], both[:, 1]
            found[key] = mcnemar_exact(int((first > second).sum()), int((second > first).sum()))
    return found


@contextmanager
def _without_git() -> Iterator[None]:
    """Without lm-eval's asking git for the commit of the current folder, which complains on the screen where that is none."""
    from lm_eval import evaluator

    asks = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log lines and bars off the screen; errors still show."""
    import logging

    loggers = [logging.getLogger("lm_eval"), logging.getLogger("lm-eval")]
    before = [logger.level for logger in loggers]
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars
