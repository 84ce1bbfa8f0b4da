"""From tables of row losses to figures: who is best on validation rows, and what the test rows say of everybody."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from utils.evaluation.statistics import Figure, Interval, Resampled, TaskLosses, holm, resample
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
        return perplexity(self.loss.value)


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where float64 cannot hold it, above some 709."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


@dataclass(frozen=True)
class CandidateFigures:
    """What one candidate comes to over all tasks.

    `gain` is the mean share over tasks, `worst` the least share and its task, `forgetting` the loss on a text of no expert's
    kind less the base's, where there is one; each `difference` is that less the reference's. `chosen_by` is what candidates
    were chosen by where that is another figure of the shares. p-values are Holm-corrected (`all_figures`).
    """

    name: str
    tasks: Mapping[str, TaskFigures]
    gain: Interval
    difference: Interval | None
    worst: Interval
    worst_task: str
    worst_difference: Interval | None
    forgetting: Interval | None
    forgetting_difference: Interval | None
    chosen_by: Interval | None = None
    chosen_by_difference: Interval | None = None

    @property
    def p(self) -> float | None:
        """Of the mean share's difference."""
        return self.difference.p if self.difference else None


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
    chosen_by: Figure | None = None,
) -> list[CandidateFigures]:
    """The figures of every candidate, base and experts included, in the order of the table.

    Args:
        losses: on the test rows.
        against: the reference of all differences; None for no differences.
        candidates: those whose p-values are corrected for being several, measure by measure and task by task.
        general: the task on which forgetting is measured, if there is one.
        resampled: what `resample(losses)` gave, if it is at hand.
        chosen_by: what candidates were chosen by, where that is not the mean share: a figure of the shares of
            `Resampled.measured`.
    """
    drawn = resampled or resample(losses)
    base = next(iter(losses.values())).base
    found = [_figures(drawn, name, against, base, general, chosen_by) for name in drawn.names]
    places = [place for place, one in enumerate(found) if one.name in candidates]
    for key in ("difference", "worst_difference", "forgetting_difference", "chosen_by_difference"):
        corrected = _corrected([getattr(found[place], key) for place in places])
        found = _with(found, places, [{key: each} for each in corrected])
    for task in losses:
        for key in ("loss_difference", "gain_difference"):
            corrected = _corrected([getattr(found[place].tasks[task], key) for place in places])
            own = [
                {"tasks": {**found[place].tasks, task: replace(found[place].tasks[task], **{key: each})}}
                for place, each in zip(places, corrected, strict=True)
            ]
            found = _with(found, places, own)
    return found


def _corrected(differences: Sequence[Interval | None]) -> list[Interval | None]:
    p_values = holm([math.nan if each is None else each.p for each in differences])
    return [each and replace(each, p=p) for each, p in zip(differences, p_values, strict=True)]


def _with(
    figures: Sequence[CandidateFigures], places: Sequence[int], changes: Sequence[Mapping[str, Any]]
) -> list[CandidateFigures]:
    by_place = dict(zip(places, changes, strict=True))
    return [replace(one, **by_place.get(place, {})) for place, one in enumerate(figures)]


def _figures(
    drawn: Resampled, name: str, against: str | None, base: str, general: str | None, chosen_by: Figure | None
) -> CandidateFigures:
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
    other = other if drawn.measured else None
    forgetting = general in drawn.tasks
    return CandidateFigures(
        name,
        tasks,
        drawn.mean_gain(name),
        drawn.mean_gain(name, other) if other else None,
        drawn.worst_gain(name),
        min(measured, key=lambda key: measured[key], default=""),
        drawn.worst_gain(name, other) if other else None,
        drawn.loss(general, name, base) if forgetting and name != base else None,
        drawn.loss(general, name, against) if forgetting and against not in (None, name) and name != base else None,
        drawn.over_tasks(chosen_by, name) if chosen_by else None,
        drawn.over_tasks(chosen_by, name, other) if chosen_by and other else None,
    )
