"""The figures of lm-eval's tasks, each in the unit and the direction that its task gives it: cells, lines, tasks of a page."""

import math
from collections.abc import Iterator
from typing import Any

from utils.commands.evaluated import Evaluated, Generated
from utils.evaluation.lm_eval_scores import FIGURES, Accuracy, compare
from utils.reports.values import Estimate, Score, TaskScores

_NOTE = "By lm-eval; p values are those of the exact McNemar test, paired by document and prompt."


def accuracy_cells(name: str, evaluated: Evaluated, generated: Generated) -> Iterator[dict[str, Any]]:
    """One candidate's figure of each metric of lm-eval's tasks, with its difference to the reference and McNemar's p."""
    if generated.accuracy is None:
        return

    reference = evaluated.reference if evaluated.reference != name else None
    p_values = compare(generated.accuracy.samples, name, reference) if reference else {}
    found = _figures(generated.accuracy)
    for (candidate, *key), (value, higher, share) in found.items():
        if candidate != name:
            continue
        task, metric, filtered = key
        cells = {"task": task, "measure": _measure(metric, filtered), "value": value}
        cells |= {"higher_is_better": higher, "share": share}
        if (reference, *key) in found:
            cells |= {"difference": value - found[reference, *key][0], "p": p_values.get(tuple(key), math.nan)}
        yield cells


def printed_accuracy(evaluated: Evaluated, generated: Generated) -> str:
    """The metrics of lm-eval's tasks for the screen: a line for each task, metric and candidate."""
    lines = []
    for one in evaluated.candidates:
        for cells in accuracy_cells(one.name, evaluated, generated):
            against = ""
            if math.isfinite(cells.get("difference", math.nan)):
                points, plain = f"{100 * cells['difference']:+.1f} points", f"{cells['difference']:+.4f}"
                against = f"  {points if cells['share'] else plain} against {evaluated.reference}"
                against += f" (exact McNemar p {cells['p']:.4f})" if math.isfinite(cells["p"]) else ""
            lower = "" if cells["higher_is_better"] else " (lower is better)"
            lines.append(f"{cells['task']} {cells['measure']}{lower}: {one.name} {cells['value']:.4f}{against}")
    return "\n".join(sorted(lines))


def accuracy_scores(evaluated: Evaluated, generated: Generated) -> Iterator[TaskScores]:
    """One task of the page for each task and metric of lm-eval's."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in evaluated.candidates:
        for cells in accuracy_cells(one.name, evaluated, generated):
            found.setdefault((cells["task"], cells["measure"]), []).append(cells | {"candidate": one.name})
    for (task, measure), own in found.items():
        scores = [
            Score(
                cells["candidate"],
                _estimate(cells["value"]),
                _estimate(cells["difference"]) if "difference" in cells else None,
                cells.get("p"),
            )
            for cells in own
        ]
        first = own[0]
        yield TaskScores(task, measure, first["higher_is_better"], tuple(scores), percent=first["share"], note=_NOTE)


def accuracy_record(accuracy: Accuracy | None) -> list[dict[str, Any]]:
    """What a manifest says of each task and metric: the direction of its figures, and whether they are shares."""
    if accuracy is None:
        return []
    keys = ["task", "metric", "filter"]
    groups = accuracy.figures.groupby(keys, sort=False).agg({"higher_is_better": "first", "share": "first"})
    return [
        {"task": task, "measure": _measure(metric, filtered), "higher_is_better": bool(higher), "share": bool(share)}
        for (task, metric, filtered), higher, share in groups.itertuples(name=None)
    ]


def _figures(accuracy: Accuracy) -> dict[tuple[str, str, str, str], tuple[float, bool, bool]]:
    rows = accuracy.figures[list(FIGURES)].itertuples(index=False, name=None)
    return {tuple(row[:4]): tuple(row[4:]) for row in rows}


def _measure(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}, {filtered}"


def _estimate(value: float) -> Estimate:
    return Estimate(value if math.isfinite(value) else None)
