"""Evaluation results for a model card: a Markdown table, and the metadata that the hub reads where it has a name for it.

The metadata is the hub's `model-index`: one entry per data set of the hub with its metrics. Rows of a local file have
no data set there and a loss has no metric there, so those stand in the table alone.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from utils.reports.formats import decimals_for, interval, number, percent
from utils.reports.tables import outcome_of
from utils.reports.values import Contender, ModelRecord, Page, Role, Score, Standing, TaskScores, is_known

_TASK_TYPE = "text-generation"
_ORDER = list(Role)


def evaluation_section(page: Page, merged: str) -> str:
    """Markdown of what was measured: a table of base, experts, controls and the merge, and what its numbers are.

    Args:
        page: what was evaluated.
        merged: which of its contenders the card is of; other candidates are left out.

    Returns:
        A table and a list, without a heading; empty if nothing was scored.
    """
    if not any(task.scores for task in page.tasks):
        return ""
    shown = [one for one in page.contenders if one.role is not Role.CANDIDATE or one.name == merged]
    shown.sort(key=lambda one: _ORDER.index(one.role))
    tasks = [task for task in page.tasks if task.scores]
    head, align = ["model", "role"], ["---", "---"]
    for task in tasks:
        head.append(f"{task.name}, {task.measure.partition(',')[0]}")
        align.append("---:")
        if _gains(task):
            head.append(f"{task.name}, gain kept")
            align.append("---:")
    standings = {one.contender: one for one in page.standings if one.gain.known}
    if standings:
        head += ["mean gain kept", f"against {page.reference}"][: 1 + bool(page.reference)]
        align += ["---:", "---"][: 1 + bool(page.reference)]
    rows = [[_name(one, merged), one.role, *_cells(page, one, tasks, standings)] for one in shown]
    lines = [_row(map(_escaped, head)), _row(align), *(_row(row) for row in rows), ""]
    lines += [f"- {_escaped(_meaning(task))}" for task in tasks]
    lines += [f"- {_escaped(note)}" for note in page.notes]
    return "\n".join(lines) + "\n"


def inputs_section(models: Sequence[ModelRecord]) -> str:
    """Markdown table of the models that went in, with the license of each where it states one; empty without any."""
    if not models:
        return ""
    rows = [
        [_escaped(one.name), _escaped(one.role), _escaped(one.fingerprint), _escaped(one.license or "not stated")]
        for one in models
    ]
    head = ["input", "role", "revision, or hash of sampled content", "license"]
    return "\n".join([_row(head), _row(["---"] * 4), *map(_row, rows)]) + "\n"


def model_index(page: Page, merged: str, model_name: str) -> list[dict[str, Any]]:
    """The value of `model-index` in a card's metadata; empty where the hub has no name for anything that was measured.

    Args:
        page: what was evaluated.
        merged: which of its contenders the card is of.
        model_name: what the card calls it.
    """
    results = []
    for task in page.tasks:
        score = next((one for one in task.scores if one.contender == merged), None)
        metrics = _metrics(task, score) if score else []
        if task.dataset is None or not metrics:
            continue
        dataset = {"name": task.name, "type": task.dataset.id}
        optional = {"config": task.dataset.config, "split": task.dataset.split, "revision": task.dataset.revision}
        dataset |= {key: value for key, value in optional.items() if value}
        results.append({"task": {"type": _TASK_TYPE}, "dataset": dataset, "metrics": metrics})
    return [{"name": model_name, "results": results}] if results else []


def _metrics(task: TaskScores, score: Score) -> list[dict[str, Any]]:
    found = []
    if task.metric and score.value.known:
        found.append({"type": task.metric, "value": score.value.value, "name": task.measure})
    if is_known(score.perplexity):
        found.append({"type": "perplexity", "value": score.perplexity, "name": "perplexity"})
    return found


def _cells(
    page: Page, contender: Contender, tasks: Sequence[TaskScores], standings: dict[str, Standing]
) -> Iterable[str]:
    for task in tasks:
        score = next((one for one in task.scores if one.contender == contender.name), None)
        decimals = decimals_for(
            [(100 if task.percent else 1) * one.value.value for one in task.scores if one.value.known]
        )
        value = score.value.value if score else None
        yield percent(value, decimals) if task.percent else number(value, decimals)
        if _gains(task):
            yield percent(score.gain if score else None)
    if standings:
        standing = standings.get(contender.name)
        yield percent(standing.gain.value if standing else None)
        if page.reference:
            yield _difference(standing)


def _difference(standing: Standing | None) -> str:
    difference = standing.difference if standing else None
    if difference is None or not difference.known:
        return ""
    within = interval(difference, 1, scale=100.0, signed=True)
    outcome = outcome_of(difference, standing.p, higher_is_better=True)
    words = [f"{number(100 * difference.value, 1, signed=True)} points", within and f"({within})", outcome or ""]
    return " ".join(filter(None, words))


def _gains(task: TaskScores) -> bool:
    return any(is_known(one.gain) for one in task.scores)


def _meaning(task: TaskScores) -> str:
    rows = "" if task.rows is None else f", {task.rows} rows"
    better = "higher" if task.higher_is_better else "lower"
    return f"{task.name}: {task.measure}{rows}, {better} is better. {task.note}".strip()


def _name(contender: Contender, merged: str) -> str:
    return f"**{_escaped(contender.name)}**" if contender.name == merged else _escaped(contender.name)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", " ".join(text.split()))
