"""An evaluation as tables: what is printed, scores.csv (tidy) and samples.parquet (a row for each candidate and row)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from utils.commands.evaluate_accuracy import accuracy_cells
from utils.commands.evaluated import Evaluated, Generated
from utils.evaluation.figures import perplexity
from utils.evaluation.scoring import Scorer
from utils.evaluation.statistics import Interval
from utils.evaluation.tasks import ALL_TASKS, GENERAL


def scores_table(evaluated: Evaluated, generated: Generated) -> pd.DataFrame:
    """One row for each candidate, task and measure, with its 95 % interval and its difference to the reference.

    Measures: `loss` (nats per token), `perplexity`, `gain_kept` (share; of `all tasks`: the mean), `worst_gain_kept`,
    `objective` (what a search for another figure than the mean has chosen by),
    `forgetting` (nats per token above the base), and the metrics of lm-eval's tasks. `p` is Holm-corrected over the candidates,
    but for lm-eval's metrics. A perplexity's difference is that of the losses, as a factor: `loss` has it in nats.
    """
    rows = []
    for one in evaluated.candidates:
        figures = evaluated.figures[one.name]
        start = {"candidate": one.name, "role": one.role}
        for task, found in figures.tasks.items():
            rows.append(start | {"task": task, "measure": "loss"} | _cells(found.loss, found.loss_difference))
            ends = {key: perplexity(value) for key, value in _cells(found.loss, None).items()}
            rows.append(start | {"task": task, "measure": "perplexity"} | ends)
            if math.isfinite(found.gain.value):
                cells = _cells(found.gain, found.gain_difference)
                rows.append(start | {"task": task, "measure": "gain_kept"} | cells)
        rows.append(start | {"task": ALL_TASKS, "measure": "gain_kept"} | _cells(figures.gain, figures.difference))
        worst = _cells(figures.worst, figures.worst_difference)
        rows.append(start | {"task": figures.worst_task, "measure": "worst_gain_kept"} | worst)
        if figures.chosen_by is not None:
            chosen_by = _cells(figures.chosen_by, figures.chosen_by_difference)
            rows.append(start | {"task": ALL_TASKS, "measure": "objective"} | chosen_by)
        if figures.forgetting is not None:
            forgetting = _cells(figures.forgetting, figures.forgetting_difference)
            rows.append(start | {"task": GENERAL, "measure": "forgetting"} | forgetting)
        rows += [start | cells for cells in accuracy_cells(one.name, evaluated, generated)]
    columns = ["candidate", "role", "task", "measure", "value", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(7, "against", [evaluated.reference if not pd.isna(each) else "" for each in table["difference"]])
    return table


def _cells(value: Interval, difference: Interval | None) -> dict[str, Any]:
    found = {"value": value.value, "low": value.low, "high": value.high}
    if difference is not None:
        found |= {"difference": difference.value, "difference_low": difference.low, "difference_high": difference.high}
        found |= {"p": difference.p}
    return found


def samples_table(scorer: Scorer, evaluated: Evaluated) -> pd.DataFrame:
    """The losses of every test row: candidate, role, task, row, place of the row in its text, nll and tokens."""
    table = evaluated.losses.copy()
    roles = {one.name: one.role for one in evaluated.candidates}
    places = {task.name: [row.place for row in task.rows] for task in scorer.tasks}
    table.insert(1, "role", [roles[name] for name in table["candidate"]])
    pairs = zip(table["task"], table["row"], strict=True)
    table.insert(4, "place", [places[task][row] for task, row in pairs])
    return table


def printed_table(scorer: Scorer, evaluated: Evaluated) -> str:
    """The figures for the screen: loss and share of gain kept by task, mean gain, and the difference to the reference."""
    tasks = [task for task in scorer.tasks if task.name in next(iter(evaluated.figures.values())).tasks]
    head = [
        "test rows",
        *[f"{task.name} loss" + (" (kept)" if task.measures_gain else "") for task in tasks],
        "mean kept",
    ]
    if evaluated.reference:
        head.append(f"points against {evaluated.reference} (95% interval)")
    lines = [head, *(list(_printed_row(one.name, tasks, evaluated)) for one in evaluated.candidates)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    texts = [
        "  ".join(cell.ljust(width) if place in (0, len(head) - 1) else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def _printed_row(name: str, tasks: Sequence[Any], evaluated: Evaluated) -> Iterator[str]:
    figures = evaluated.figures[name]
    yield name
    for task in tasks:
        found = figures.tasks[task.name]
        yield f"{found.loss.value:.4f}" + (f" ({_percent(found.gain.value)})" if task.measures_gain else "")
    yield _percent(figures.gain.value)
    if evaluated.reference:
        difference = figures.difference
        if difference is None or not math.isfinite(difference.value):
            yield ""
        else:
            low, high = 100 * difference.low, 100 * difference.high
            yield f"{100 * difference.value:+.1f} ({low:+.1f} to {high:+.1f}; p {figures.p:.4f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if math.isfinite(share) else "-"
