"""What candidates are evaluated on: held-out rows of a text, those for choosing and those for reporting kept apart.

A task is a text with rows that calibration did not see. `validation` rows are for choosing between candidates, `test`
rows for reporting; no row is both, and no text stands in two places (`prove_apart`).
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from utils.errors import UserError
from utils.evaluation.row_origins import Origin, calibration_rows, origin_of
from utils.models.checkpoints import is_local
from utils.pair.calibration import choose_samples, open_rows, row_order, with_defaults
from utils.pair.config import PairConfig
from utils.pair.evaluation import EvaluationText, text_of_calibration
from utils.pair.rows import Rows, looks_like_file
from utils.pair.sample_text import Sample, make_sample, render, template_columns
from utils.pair.source import CalibrationSource

VALIDATION, TEST = "validation", "test"
GENERAL = "general"
ALL_TASKS = "all tasks"  # of figures of all of them
_VALIDATION_SPLITS = ("validation", "valid", "dev")
LEAST_ROWS = 2  # rows of a part: with one there is nothing to resample


@dataclass(frozen=True)
class Row:
    """One row of a task: `prompt` is context, `answer` is what the loss counts; or chat messages, the last one counted.

    `place` says where it comes from (`test:17`), `part` whether it is for `validation` or `test`; `origin` is its text, and
    `number` the row there.
    """

    part: str
    place: str
    prompt: str
    answer: str
    messages: tuple[Mapping[str, Any], ...] | None = field(default=None, repr=False)
    origin: Origin | None = field(default=None, repr=False)
    number: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the row's text: equal digests, equal rows."""
        return text_digest(self.prompt + self.answer if self.messages is None else repr(self.messages))


@dataclass(frozen=True)
class Task:
    """A named text with its rows; a row is known by its number in `rows`, which the config settles.

    `experts` are the types whose text this is (none for a third kind of text). `summary` says in a line where the rows
    come from; `hub` is the data set of the hub of the test rows, if it is one: `id`, and `config` and `split` it has.
    """

    name: str
    seqlen: int
    rows: tuple[Row, ...] = field(repr=False)
    experts: tuple[str, ...] = ()
    summary: str = ""
    hub: Mapping[str, str] | None = None

    @property
    def measures_gain(self) -> bool:
        """Whether experts are meant to be good at it: any text but the general one."""
        return self.name != GENERAL

    def part(self, name: str) -> list[int]:
        """The numbers of the rows for `validation` or `test`."""
        return [number for number, row in enumerate(self.rows) if row.part == name]

    def record(self) -> dict[str, Any]:
        """What a manifest says of it: the text, whose it is, the places of its rows."""
        return {
            "name": self.name,
            "text": self.summary,
            "experts": list(self.experts),
            "rows_sha256": self.digest,
            "hub": self.hub,
            "rows": {part: [self.rows[row].place for row in self.part(part)] for part in (VALIDATION, TEST)},
        }

    @property
    def digest(self) -> str:
        """SHA-256 of all rows in their order."""
        return text_digest("".join(f"{row.part}{row.digest}" for row in self.rows) + str(self.seqlen))


def evaluation_rows(config: PairConfig, *, validation: int = 64, test: int = 128) -> list[Task]:
    """The tasks of a pair config with their rows: `evaluation`, or each expert's own text; and `general`.

    Args:
        config: the pair config.
        validation, test: how many rows of each part; fewer where the text has fewer.

    Raises:
        UserError: a text that cannot be read, has no data, or no rows that calibration leaves over.
    """
    seen = _calibration_digests(config)
    tasks = []
    for name, text in task_texts(config).items():
        if text.source is None:
            continue
        task = _task(name, text, config, seen, validation, test)
        seen |= {row.digest for row in task.rows}
        tasks.append(task)
    prove_apart(tasks)
    return tasks


def task_texts(config: PairConfig) -> dict[str, EvaluationText]:
    """The text of every task by name: those of `evaluation`, or one for each text of experts to merge where it names
    none (but tasks of lm-eval's); and `general`.

    Raises:
        UserError: a task has a name that tables have for something else.
    """
    asked = dict(config.evaluation)
    if not any(text.source for text in asked.values()):
        asked = {}
        for source, users in _users_of_texts(config).items():
            asked["+".join(users)] = text_of_calibration(source)
    for name in sorted({GENERAL, ALL_TASKS} & asked.keys()):
        raise UserError(
            f"evaluation: no task can be named {name!r}, which tables have for something else: give it another name under "
            "evaluation (an expert's own text is named after the expert until it is named there)",
            "evaluation-reserved-name",
        )
    return asked | ({GENERAL: config.general} if config.general else {})


def prove_apart(tasks: Sequence[Task]) -> None:
    """Raise a `UserError` if a text stands in both parts of the tasks: what is chosen on is not reported on."""
    parts: dict[str, tuple[str, str]] = {}
    for task in tasks:
        for row in task.rows:
            other = parts.setdefault(row.digest, (row.part, task.name))
            if other[0] != row.part:
                raise UserError(
                    f"task {task.name}, row {row.place}: the same text is a {other[0]} row of {other[1]}, so choosing "
                    "and reporting would share it; give the tasks texts of their own",
                    "evaluation-rows-overlap",
                )


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _calibration_digests(config: PairConfig) -> set[str]:
    samples = [sample for source in config.texts for sample in choose_samples(source, config.nsamples)]
    return {_row(sample, TEST, "", None, {}).digest for sample in samples}


@dataclass(frozen=True)
class _Part:
    """Rows of one split, in the order in which they are taken."""

    source: CalibrationSource
    rows: Rows
    order: list[int]

    @property
    def where(self) -> str:
        return self.source.split or "row"


def _task(
    name: str, text: EvaluationText, config: PairConfig, seen: Collection[str], validation: int, test: int
) -> Task:
    source = with_defaults(text.source)
    parts = _parts(source, text.split_given, config)
    taken, dropped = set(seen), 0
    chosen: dict[str, list[Row]] = {}
    for part, wanted in _wanted(parts, validation, test).items():
        place, rows = parts[part], []
        while place.order and len(rows) < wanted:
            row = _read_row(place, place.order.pop(0), part, text.answer, name)
            if row.digest in taken:
                dropped += 1
            else:
                taken.add(row.digest)
                rows.append(row)
        chosen[part] = rows
    for part, rows in chosen.items():
        if len(rows) < LEAST_ROWS:
            left, remedy = "", f"give evaluation.{name} another text"
            if dropped:  # else calibration took none of them
                left, remedy = " that calibration did not see", f"lower nsamples ({config.nsamples}), or {remedy}"
            raise UserError(
                f"task {name}: {source.path} has {len(rows)} {part} rows{left}, at least {LEAST_ROWS} are needed; {remedy}",
                "evaluation-no-rows",
            )
    shared = {"+".join(users): tuple(users) for users in _users_of_texts(config).values()}
    experts = shared.get(name) or tuple(entry.type for entry in config.experts if entry.type == name)
    shown = {part: f"{len(rows)} {part} rows of {parts[part].source.shown}" for part, rows in chosen.items()}
    splits = {part: f" ({place.source.split})" if place.source.split else "" for part, place in parts.items()}
    summary = " and ".join(shown[part] + splits[part] for part in (VALIDATION, TEST))
    summary += ", none of them seen by calibration or shared"
    if dropped:
        summary += f"; {dropped} rows with texts that are elsewhere left out"
    rows = (*chosen[VALIDATION], *chosen[TEST])
    return Task(name, source.seqlen, rows, experts, summary, _hub(parts[TEST].source))


def _hub(source: CalibrationSource) -> dict[str, str] | None:
    """The data set of the hub that rows come from; None for a file or folder."""
    if looks_like_file(source.path) or is_local(source.path):
        return None
    named = {"id": source.path, "config": source.subset, "split": source.split}
    return {key: value for key, value in named.items() if value}


def _wanted(parts: "Mapping[str, _Part]", validation: int, test: int) -> dict[str, int]:
    """How many rows of each part to take; of a split that both share and that is too small, the same shares of it."""
    if parts[VALIDATION] is parts[TEST]:
        there = len(parts[TEST].order)
        validation = min(validation, there * validation // (validation + test))
    return {VALIDATION: validation, TEST: test}


def _users_of_texts(config: PairConfig) -> dict[CalibrationSource, list[str]]:
    """Each text of the experts to merge, and the types of those whose it is."""
    found: dict[CalibrationSource, list[str]] = {}
    for entry in config.experts_to_merge:
        found.setdefault(config.text_of(entry.type), []).append(entry.type)
    return found


def _parts(source: CalibrationSource, split_given: bool, config: PairConfig) -> dict[str, _Part]:
    """Where validation and test rows come from: splits that calibration does not use, else rows it leaves over."""
    if looks_like_file(source.path) or split_given:
        whole = _open(source, config)
        return {VALIDATION: whole, TEST: whole}
    names = _split_names(source)
    test = _open(replace(source, split="test"), config) if "test" in names else _open(source, config)
    other = next((name for name in _VALIDATION_SPLITS if name in names), None)
    validation = _open(replace(source, split=other), config) if other else test
    return {VALIDATION: validation, TEST: test}


def _open(source: CalibrationSource, config: PairConfig) -> _Part:
    rows = open_rows(source)
    used = calibration_rows(config, source, len(rows))
    return _Part(source, rows, [number for number in row_order(source, len(rows)) if number not in used])


def _split_names(source: CalibrationSource) -> list[str]:
    from datasets import get_dataset_split_names

    try:
        return get_dataset_split_names(source.path, source.subset)
    except Exception:  # offline, or a builder that does not say: then only the split that calibration uses is known
        return []


def _read_row(part: _Part, number: int, name: str, answer: str | None, task: str) -> Row:
    values = part.rows[number]
    sample = make_sample(number, values, part.source)
    row = _row(sample, name, f"{part.where}:{number}", answer_template(part.source, answer, task), values)
    source = part.source
    return replace(row, origin=origin_of(source.path, source.subset, source.split), number=number)


def answer_template(source: CalibrationSource, answer: str | None, task: str) -> tuple[str, bool] | None:
    """The answer's template and whether the text's template ends with it; None where the whole text counts.

    Raises:
        UserError: the text holds the answer's columns somewhere else than at its end.
    """
    if answer is None:
        return None
    text = source.text or "{text}"
    key = f"evaluation.{task}"
    if text.endswith(answer):
        return answer, True
    both = set(template_columns(answer, f"{key}.answer")) & set(template_columns(text, f"{key}.text"))
    if both:
        raise UserError(
            f"{key}: text {text!r} holds {{{sorted(both)[0]}}} and does not end with the answer {answer!r}; let text end "
            "with it, or give text without it (the answer is put behind)",
            "evaluation-answer-not-last",
        )
    return answer, False


def _row(sample: Sample, part: str, place: str, answer: tuple[str, bool] | None, values: Mapping[str, Any]) -> Row:
    if sample.messages is not None:
        return Row(part, place, "", "", tuple(sample.messages))
    if answer is None:
        return Row(part, place, "", sample.text)
    template, within = answer
    rendered = render(template, values, place)
    if not rendered.strip():
        raise UserError(f"row {place}: its answer is empty; remove the row", "evaluation-empty-answer")
    prompt = sample.text[: len(sample.text) - len(rendered)] if within else sample.text
    return Row(part, place, prompt, rendered)
