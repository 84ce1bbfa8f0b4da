"""The text of the quality benchmark: three disjoint splits per task, and what the base model reads.

With a data folder (`gsm8k/{train,test}.jsonl`, `mbpp/{train,validation,test,prompt}.jsonl`) the tasks are GSM8K and
MBPP; without one they are the arithmetic and the Python functions of the offline example. Training and calibration
text come from the train split, choices are made on validation, figures on test. No row of one split shares its
question, its answer or its whole text with a row of another (case and spacing apart).
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.texts import Sizes, build_texts
from utils.errors import UserError

FILES = {
    "gsm8k": ("train", "test"),
    "mbpp": ("train", "validation", "test", "prompt"),
}
# GSM8K has no validation split: the last rows of its train split are never trained on, whatever the seed.
SPARE = 320


@dataclass(frozen=True)
class TextSizes:
    """How many rows each part holds; `base_rows` are rows of every task that the base model reads as well."""

    base_prose: int = 700
    base_code: int = 1300
    base_rows: int = 1200
    calibration: int = 64
    validation: int = 80
    test: int = 200


@dataclass(frozen=True)
class TaskTexts:
    """One task: what its expert is trained on, what guidance may read, what choices and figures are made on."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def held_out(self) -> tuple[tuple[str, ...], ...]:
        """The parts that nothing is trained on."""
        return self.test, self.validation, self.calibration


@dataclass(frozen=True)
class Texts:
    """Everything one seed reads: the base model's mixture and the tasks by name; `origin` says where it is from."""

    base: tuple[str, ...]
    tasks: Mapping[str, TaskTexts]
    origin: str


@dataclass(frozen=True)
class Row:
    """A question, its answer and what may follow it (MBPP's checks of the answer)."""

    question: str
    answer: str
    checks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What a model reads."""
        return "\n".join([self.question, self.answer, *self.checks]) + "\n"

    @property
    def keys(self) -> frozenset[str]:
        """Two rows with a key in common count as the same row."""
        return frozenset(map(row_key, (self.question, self.answer, self.text)))


def texts_of_seed(data: Path | None, sizes: TextSizes, seed: int) -> Texts:
    """The text of one seed. Held-out rows are the same for every seed; training and calibration rows are drawn.

    Raises:
        UserError: `data` lacks a file or holds other columns than the published data sets.
    """
    return _offline_texts(sizes, seed) if data is None else _published_texts(data, sizes, seed)


def assert_disjoint(texts: Texts) -> None:
    """Raise `AssertionError` if two parts share a row; `base` and `train` of a task may, as both are training text."""
    held_out: set[str] = set()
    for name, task in texts.tasks.items():
        for part in task.held_out:
            own = {row_key(text) for text in part}
            if len(own) != len(part) or own & held_out:
                raise AssertionError(f"a held-out row of {name} occurs twice")
            held_out |= own
    for part in (texts.base, *(task.train for task in texts.tasks.values())):
        if any(row_key(text) in held_out for text in part):
            raise AssertionError("a row of the training text is held out as well")


def separate(parts: Sequence[Iterable[Row]]) -> list[list[Row]]:
    """Drop from each part what an earlier part, or the part itself, already holds (by any key of a row)."""
    seen: set[str] = set()
    kept = []
    for part in parts:
        own = []
        for row in part:
            if not row.keys & seen:
                own.append(row)
                seen |= row.keys
        kept.append(own)
    return kept


def published_pools(data: Path) -> dict[str, tuple[list[Row], list[Row], list[Row]]]:
    """By task the rows of which test text is taken, those of validation, and those for training and calibration."""
    gsm8k = {part: _read(data / "gsm8k" / f"{part}.jsonl", _gsm8k_row) for part in FILES["gsm8k"]}
    mbpp = {part: _read(data / "mbpp" / f"{part}.jsonl", _mbpp_row) for part in FILES["mbpp"]}
    return {
        "gsm8k": (gsm8k["test"], gsm8k["train"][-SPARE:], gsm8k["train"][:-SPARE]),
        "mbpp": (mbpp["test"], mbpp["validation"], [*mbpp["train"], *mbpp["prompt"]]),
    }


def _published_texts(data: Path, sizes: TextSizes, seed: int) -> Texts:
    draw = random.Random(seed)
    offline = Sizes(
        base_prose=sizes.base_prose, base_code=sizes.base_code, base_math=0, train=0, calibration=0, heldout=0
    )
    base = list(build_texts(offline, seed).base)
    tasks = {}
    for name, pool in published_pools(data).items():
        test, validation, training = separate(pool)
        draw.shuffle(training)
        calibration, training = training[: sizes.calibration], training[sizes.calibration :]
        tasks[name] = TaskTexts(
            train=_texts(training),
            calibration=_texts(calibration),
            validation=_texts(validation[: sizes.validation]),
            test=_texts(test[: sizes.test]),
        )
        base += tasks[name].train[: sizes.base_rows]
    draw.shuffle(base)
    held_out = {row_key(text) for task in tasks.values() for part in task.held_out for text in part}
    base = [text for text in base if row_key(text) not in held_out]
    return Texts(tuple(base), tasks, "GSM8K and MBPP")


def _offline_texts(sizes: TextSizes, seed: int) -> Texts:
    # Held-out rows come from a fixed draw; the rows of a seed's own draw that occur there are dropped.
    held = build_texts(Sizes(0, 0, 0, 0, sizes.validation, sizes.test), seed=0)
    own = build_texts(
        Sizes(sizes.base_prose, sizes.base_code // 4, sizes.base_rows // 4, 900, sizes.calibration, 0), seed=seed + 1
    )
    pairs = {"math": (held.math, own.math), "code": (held.code, own.code)}
    held_out = {row_key(text) for split, _ in pairs.values() for text in (*split.heldout, *split.calibration)}
    held_out_now = held_out | {row_key(text) for _, split in pairs.values() for text in split.calibration}
    tasks = {
        name: TaskTexts(
            train=_without(split.train, held_out_now),
            calibration=_without(split.calibration, held_out),
            validation=fixed.calibration,
            test=fixed.heldout,
        )
        for name, (fixed, split) in pairs.items()
    }
    return Texts(_without(own.base, held_out_now), tasks, "the offline example: arithmetic and Python functions")


def _read(path: Path, row_of) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"--data: {path} cannot be read: {error.strerror}; see --help for the layout", "data-unreadable"
        ) from error
    try:
        return [row_of(json.loads(line)) for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data: {path} is not the published data set's JSONL: {error!r}", "data-malformed") from error


def _gsm8k_row(values: Mapping) -> Row:
    return Row(values["question"].strip(), values["answer"].strip())


def _mbpp_row(values: Mapping) -> Row:
    code = values["code"].replace("\r\n", "\n").replace("\t", "    ").strip()
    return Row(values["text"].strip(), code, tuple(values["test_list"]))


def _texts(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(row.text for row in rows)


def _without(texts: Iterable[str], keys: set[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if row_key(text) not in keys)


def row_key(text: str) -> str:
    """What two rows that count as the same have in common."""
    return " ".join(text.casefold().split())
