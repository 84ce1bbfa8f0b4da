"""Rows of a task as token ids, and which of the tokens the loss counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.errors import UserError, brief
from utils.evaluation.tasks import LEAST_ROWS, TEST, VALIDATION, Row, Task
from utils.pair.batches import MicroBatch

_CHARACTERS_PER_TOKEN = 1024  # no tokenizer's tokens are this long on average


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a row; those from `first` on are scored (none where the prompt alone fills the sequence)."""

    ids: list[int]
    first: int

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return max(0, len(self.ids) - self.first)


@dataclass(frozen=True)
class ScoredBatch:
    """Rows that go through a model together: the micro-batch, and for each its task, number and first scored token."""

    batch: MicroBatch
    rows: tuple[tuple[str, int], ...]
    firsts: tuple[int, ...]


def encode_task(task: Task, tokenizer: Any, where: str) -> list[EncodedRow]:
    """All rows of a task in a tokenizer's tokens, special tokens once, cut off after the task's `seqlen` tokens.

    A token that holds characters of both prompt and answer counts as answer. The first token is never scored: nothing
    stands before it.

    Raises:
        UserError: text the tokenizer cannot encode, chat messages without a chat template, or not a token to score.
    """
    encoded = [_encode(row, tokenizer, task.seqlen, f"{where}, task {task.name}") for row in task.rows]
    if not any(row.tokens for row in encoded):
        raise UserError(
            f"task {task.name}: no row has a token to score within seqlen ({task.seqlen}); raise evaluation."
            f"{task.name}.seqlen",
            "evaluation-nothing-scored",
        )
    return encoded


def without_cut_rows(task: Task, encodings: Sequence[Sequence[EncodedRow]]) -> tuple[Task, str]:
    """A task with the rows alone that have a token to score in all of some tokenizers: the answer of the others begins
    behind `seqlen` tokens, and they would count for nothing.

    Args:
        task: the task.
        encodings: what `encode_task` gave of it, for each tokenizer.

    Returns:
        The task, and a warning that counts what was left out; empty where nothing was.

    Raises:
        UserError: a part of the task is left with fewer than two rows, which is too few to resample.
    """
    kept = [row for row, *found in zip(task.rows, *encodings, strict=True) if all(one.tokens for one in found)]
    if len(kept) == len(task.rows):
        return task, ""
    left = replace(task, rows=tuple(kept))
    counts = []
    for part in (VALIDATION, TEST):
        before, after = len(task.part(part)), len(left.part(part))
        if after < min(before, LEAST_ROWS):
            raise UserError(
                f"task {task.name}: {after} of {before} {part} rows have a token to score within seqlen ({task.seqlen}); "
                f"raise evaluation.{task.name}.seqlen",
                "evaluation-nothing-scored",
            )
        counts.append(f"{before - after} of {before} {part} rows")
    warning = (
        f"task {task.name}: {' and '.join(counts)} have no token to score within seqlen ({task.seqlen}) and are left out; "
        f"raise evaluation.{task.name}.seqlen"
    )
    said = f"; {len(task.rows) - len(kept)} without a token to score within {task.seqlen} left out"
    return replace(left, summary=task.summary + said), warning


def scored_batches(
    tasks: Mapping[str, Sequence[EncodedRow]], rows: Mapping[str, Sequence[int]], tokens_at_once: int, pad_id: int
) -> list[ScoredBatch]:
    """Group the chosen rows of each task, similar lengths together, into right-padded batches.

    Args:
        tasks: every task's rows.
        rows: the numbers of those to score, by task.
        tokens_at_once: tokens of a batch, pads included; a longer row is a batch of its own.
        pad_id: what to pad with; pads are masked.
    """
    batches = []
    for name, numbers in rows.items():
        groups: list[list[int]] = []
        lengths = {number: len(tasks[name][number].ids) for number in numbers}
        for number in sorted(lengths, key=lambda one: (-lengths[one], one)):
            if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens_at_once:
                groups[-1].append(number)
            else:
                groups.append([number])
        for group in groups:
            chosen = [tasks[name][number] for number in group]
            batch = MicroBatch.of([row.ids for row in chosen], pad_id)
            batches.append(ScoredBatch(batch, tuple((name, one) for one in group), tuple(row.first for row in chosen)))
    return batches


def _encode(row: Row, tokenizer: Any, seqlen: int, where: str) -> EncodedRow:
    if row.messages is None:
        prompt, text, special = row.prompt, row.prompt + row.answer, True
    else:
        prompt, text = chat_texts(row.messages, tokenizer, f"{where}, row {row.place}")
        special = False
    ids = _ids(text, tokenizer, seqlen, special, where, row.place)
    before = _ids(prompt, tokenizer, seqlen, special, where, row.place) if prompt else []
    return EncodedRow(ids, max(1, _common(ids, before)))


def chat_texts(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> tuple[str, str]:
    """A conversation before its last message, with the generation prompt; and the whole of it.

    Raises:
        UserError: no chat template, or one that refuses the messages; a single message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: its tokenizer has no chat template; give text and answer instead of messages",
            "evaluation-no-chat-template",
        )
    if len(messages) < 2:
        raise UserError(f"{where}: one message alone has no answer to score", "evaluation-no-answer")
    try:
        prompt = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # templates raise errors of their own kinds
        raise UserError(f"{where}: the chat template refuses it: {brief(error)}", "evaluation-chat-refused") from error
    if not whole.startswith(prompt):  # a template that writes past turns differently, or no generation prompt
        whole = prompt + str(messages[-1].get("content", ""))
    return prompt, whole


def _ids(text: str, tokenizer: Any, seqlen: int, special: bool, where: str, place: str) -> list[int]:
    text = text[: _CHARACTERS_PER_TOKEN * seqlen]
    try:
        return tokenizer(text, add_special_tokens=special, truncation=True, max_length=seqlen)["input_ids"]
    except Exception as error:  # tokenizers raise errors of their own kinds, plain Exception among them
        raise UserError(
            f"{where}: the tokenizer cannot encode row {place}: {brief(error)}", "evaluation-not-encodable"
        ) from error


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the common beginning of two sequences."""
    return next(
        (place for place, (one, other) in enumerate(zip(left, right, strict=False)) if one != other),
        min(len(left), len(right)),
    )
