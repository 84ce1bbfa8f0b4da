"""From tables of row losses to figures: who is best on validation rows, and what the test rows say of everybody."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from utils.evaluation.statistics import Interval, Resampled, TaskLosses, holm, resample
from utils.evaluation.tasks import Task


@dataclass(frozen=True)
class TaskFigures:
    """What one candidate comes to on one task; differences are against the reference, None for the reference itself.

    `loss` in nats per token, `gain` the share of the expert's gain kept (NaN where there is none).
    """

    loss: Interval
    gain: Interval
    loss_difference: Interval | None
    gain_difference: Interval | None

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return float(np.exp(self.loss.value))


@dataclass(frozen=True)
class CandidateFigures:
    """What one candidate comes to over all tasks.

    `gain` is the mean share over tasks, `difference` that less the reference's with `p` Holm-corrected, `worst` the
    least share and its task. `forgetting` is the loss on a text of no expert's kind less the base's, where there is one.
    """

    name: str
    tasks: Mapping[str, TaskFigures]
    gain: Interval
    difference: Interval | None
    p: float | None
    worst: float
    worst_task: str
    forgetting: Interval | None


def task_losses(table: pd.DataFrame, tasks: Sequence[Task], base: str, experts: Sequence[str]) -> dict[str, TaskLosses]:
    """The losses of each task as arrays; a task's expert is the one whose text it is, else the best one there.

    Args:
        table: what `Scorer.score` gives, with the base and the experts among the candidates.
        tasks: those scored.
        base, experts: the names that these have in the table.
    """
    names = tuple(dict.fromkeys(table["candidate"]))
    found = {}
    for task in tasks:
        part = table[table["task"] == task.name]
        if part.empty:
            continue
        nll = part.pivot(index="candidate", columns="row", values="nll").loc[list(names)].to_numpy()
        tokens = part.pivot(index="candidate", columns="row", values="tokens").loc[list(names)].to_numpy()
        whole = TaskLosses(names, nll, tokens, base, None)
        own = [name for name in task.experts if name in experts]
        if task.measures_gain:
            by_loss = dict(zip(names, nll.sum(axis=1), strict=True))
            known = [name for name in own or experts if np.isfinite(by_loss[name])]
            expert = min(known, key=lambda name: by_loss[name]) if known else None
            whole = TaskLosses(names, nll, tokens, base, expert)
        found[task.name] = whole
    return found


def merit(losses: Mapping[str, TaskLosses], name: str) -> float:
    """What to choose a candidate by: the mean share of gain kept; without gains, the mean loss, negative.

    -inf for a candidate without losses.
    """
    place = next(iter(losses.values())).names.index(name)
    gains = [task.gain()[place] for task in losses.values() if task.has_gain]
    value = float(np.mean(gains)) if gains else float("nan")
    if np.isfinite(value):
        return value
    value = -float(np.mean([task.loss()[place] for task in losses.values()]))
    return value if np.isfinite(value) else float("-inf")


def all_figures(
    losses: Mapping[str, TaskLosses],
    against: str | None,
    candidates: Sequence[str],
    general: str | None,
    resampled: Resampled | None = None,
) -> list[CandidateFigures]:
    """The figures of every candidate, base and experts included, in the order of the table.

    Args:
        losses: on the test rows.
        against: the reference of all differences; None for no differences.
        candidates: those whose p-values are corrected for being several.
        general: the task on which forgetting is measured, if there is one.
        resampled: what `resample(losses)` gave, if it is at hand.
    """
    drawn = resampled or resample(losses)
    base = next(iter(losses.values())).base
    found = [_figures(drawn, name, against, base, general) for name in drawn.names]
    corrected = [one for one in found if one.name in candidates and one.difference is not None]
    p_values = dict(zip((one.name for one in corrected), holm([one.difference.p for one in corrected]), strict=True))
    return [
        CandidateFigures(**{**vars(one), "p": p_values.get(one.name, one.difference.p if one.difference else None)})
        for one in found
    ]


def _figures(drawn: Resampled, name: str, against: str | None, base: str, general: str | None) -> CandidateFigures:
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    other = None if against in (None, name) else against
    tasks = {}
    for key, task in drawn.tasks.items():
        tasks[key] = TaskFigures(
            drawn.loss(key, name),
            drawn.gain(key, name) if task.expert else nothing,
            drawn.loss(key, name, other) if other else None,
            drawn.gain(key, name, other) if other and task.expert else None,
        )
    measured = {key: one.gain.value for key, one in tasks.items() if np.isfinite(one.gain.value)}
    worst = min(measured, key=lambda key: measured[key], default="")
    has_gain = any(task.has_gain for task in drawn.tasks.values())
    return CandidateFigures(
        name,
        tasks,
        drawn.mean_gain(name) if has_gain else nothing,
        drawn.mean_gain(name, other) if other and has_gain else None,
        None,
        measured.get(worst, float("nan")),
        worst,
        drawn.loss(general, name, base) if general in drawn.tasks and name != base else None,
    )
