"""Rows to score on that were seen before: by a measurement, which may have been made with another config, or by a search that
chose on them. (What the config has calibration take is left out: `tasks.py`.)"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.errors import UserError
from utils.evaluation.row_origins import Origin, origin_of
from utils.evaluation.tasks import TEST, VALIDATION, Task


def refuse_measured_rows(tasks: Sequence[Task], samples: Any, what: str) -> None:
    """Refuse what was measured on rows that it would be scored on.

    Args:
        tasks: with the rows to score on.
        samples: the texts and rows that a manifest has recorded (one record, or a list), whatever stands there.
        what: what to call it in a message.

    Raises:
        UserError: a row of a task is among them.
    """
    seen: dict[Origin, set[int]] = {}
    for origin, rows in _recorded(samples):
        seen.setdefault(origin, set()).update(rows)
    for task in tasks:
        count = sum(row.number in seen.get(row.origin, ()) for row in task.rows)
        if count:
            raise UserError(
                f"{what} was measured on {count} of the {len(task.rows)} rows of task {task.name}, so that its figures would "
                "be those of text that it has seen: set nsamples (and seed) in the pair config as they were then, which "
                "leaves these rows out, or measure again",
                "evaluation-rows-measured",
            )


def doubt_chosen_rows(tasks: Sequence[Task], search: Any, what: str) -> Iterator[str]:
    """A sentence for each task of whose test rows some may be among those that a search chose a recipe on.

    A text's rows are taken in one order, those for validation first: with more of them there than here, the last ones are
    test rows here.

    Args:
        tasks: with the rows to score on.
        search: what the recipe's manifest says of its search, whatever stands there.
        what: what to call the recipe in a sentence.
    """
    counts = search.get("validation_rows") if isinstance(search, Mapping) else None
    for task in tasks if isinstance(counts, Mapping) else ():
        before, here, test = counts.get(task.name), task.part(VALIDATION), task.part(TEST)
        one_text = {task.rows[row].origin for row in here} & {task.rows[row].origin for row in test}
        if isinstance(before, int) and before > len(here) and one_text:
            yield (
                f"{what} was chosen by a search on {before} validation rows of {task.name}, of which up to "
                f"{min(before - len(here), len(test))} are test rows here, so that its figures there are too good; give "
                f"--validation_rows {before}, as the search had"
            )


def _recorded(samples: Any) -> Iterator[tuple[Origin, list[int]]]:
    for record in samples if isinstance(samples, list) else [samples]:
        if not isinstance(record, Mapping) or not isinstance(record.get("path"), str):
            continue
        rows = record.get("rows")
        named = [value if isinstance(value, str) else None for value in (record.get("subset"), record.get("split"))]
        yield (
            origin_of(record["path"], *named),
            [row for row in rows if isinstance(row, int)] if isinstance(rows, list) else [],
        )
