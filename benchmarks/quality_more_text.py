"""Calibration text beside what the quality benchmark reads: more rows of a task, rows of another task, of another source."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.quality_texts import Texts, TextSizes, published_pools, row_key, separate
from benchmarks.quality_third import TASK
from demo.texts import CODE_PER_FILE, Sizes, build_texts
from utils.errors import UserError

OWN, HALF, SWAPPED, ELSEWHERE = "own", "half another task's", "another task's", "another source's"
# What the offline example has of the same kind: arithmetic in words, functions of the standard library.
_LIKE = {"gsm8k": "math", "mbpp": "code", "math": "math", "code": "code"}


def text_of_kind(texts: Texts, kind: str, rows: int, data: Path | None, seed: int) -> Texts:
    """The texts with other calibration rows: so many, of each task's own, of the next task's, of another source.

    Raises:
        UserError: there are no further rows: without `data`.
    """
    texts = with_more_calibration(texts, rows, data, seed)
    names = list(texts.tasks)
    own = {name: texts.tasks[name].calibration[:rows] for name in names}
    following = dict(zip(names, [own[name] for name in (*names[1:], names[0])], strict=True))
    if kind == HALF:
        own = {name: (*mine[: rows // 2], *following[name][rows // 2 :]) for name, mine in own.items()}
    elif kind == SWAPPED:
        own = following
    elif kind == ELSEWHERE:
        own = _of_another_source(texts, rows, seed)
    return _with_calibration(texts, own, rows)


def with_more_calibration(texts: Texts, rows: int, data: Path | None, seed: int) -> Texts:
    """The texts with so many calibration rows of each task, at least; what is added is in no other part, whatever the seed.

    Raises:
        UserError: there are not so many.
    """
    short = {name: task.calibration for name, task in texts.tasks.items() if len(task.calibration) < rows}
    if not short:
        return texts
    spare = _spare_rows(texts, rows, data, seed)
    return _with_calibration(texts, {name: (*own, *spare.get(name, ()))[:rows] for name, own in short.items()}, rows)


def _spare_rows(texts: Texts, rows: int, data: Path | None, seed: int) -> dict[str, tuple[str, ...]]:
    """What the published sets hold out and the benchmark's sizes leave over; of the third task, further files."""
    found = {}
    for name, pool in ({} if data is None else published_pools(data)).items():
        test, validation, _ = separate(pool)
        found[name] = _unread(texts, [row.text for row in (*validation, *test)])
    if TASK in texts.tasks:
        # The same files come first, so that most of what is drawn again is the test text, which is left out.
        count = TextSizes().test + rows - len(texts.tasks[TASK].calibration) + CODE_PER_FILE
        more = Sizes(base_prose=0, base_code=0, base_math=0, train=0, calibration=0, heldout=count)
        found[TASK] = _unread(texts, build_texts(more, seed).code.heldout)
    return found


def _of_another_source(texts: Texts, rows: int, seed: int) -> dict[str, tuple[str, ...]]:
    """Rows of the offline example, of the kind nearest to each task's."""
    # Twice as many, since the base has read some.
    sizes = Sizes(base_prose=0, base_code=0, base_math=0, train=0, calibration=2 * rows, heldout=0)
    example = build_texts(sizes, seed + 1)
    return {
        name: _unread(texts, getattr(example, _LIKE[name]).calibration)[:rows] for name in texts.tasks if name in _LIKE
    }


def _unread(texts: Texts, rows: Iterable[str]) -> tuple[str, ...]:
    """Each row once that is in no part of the texts."""
    parts = [texts.base, *(part for task in texts.tasks.values() for part in (task.train, *task.held_out))]
    read = {row_key(row) for part in parts for row in part}
    return tuple(row for key, row in {row_key(row): row for row in rows}.items() if key not in read)


def _with_calibration(texts: Texts, own: dict[str, tuple[str, ...]], rows: int) -> Texts:
    """The texts with the calibration rows of some tasks replaced. Raises a `UserError` if these are fewer than `rows`."""
    for name, found in own.items():
        if len(found) < rows:
            raise UserError(
                f"--rows {rows}: {name} has {len(found)} that nothing else reads; give fewer, or the published sets by --data",
                "quality-too-few-rows",
            )
    tasks = {name: replace(task, calibration=own.get(name, task.calibration)) for name, task in texts.tasks.items()}
    return replace(texts, tasks=tasks)
