"""Where calibration text comes from, and how it becomes token batches.

Rows come from a hub data set or a local file; `nsamples` of them are chosen by the permutation that
`datasets.Dataset.shuffle(seed)` uses, so that a local copy of a hub data set yields the same samples.
"""

import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief
from utils.pair.rows import Rows, local_rows, looks_like_file
from utils.pair.source import CalibrationSource
from utils.trial import is_failure

if TYPE_CHECKING:
    from utils.pair.batches import MicroBatch

# The reference's data sets and text format (arXiv 2503.03874, released code).
BUILT_IN = {
    "gsm8k": CalibrationSource(path="openai/gsm8k", subset="main", split="train", text="{question} {answer}"),
    "mbpp": CalibrationSource(path="google-research-datasets/mbpp", subset="full", split="train", text="{text} {code}"),
}

# No tokenizer's tokens are this long on average: characters further on cannot reach the first `seqlen` tokens, and a
# row that holds a whole book need not be tokenized to its end.
_CHARACTERS_PER_TOKEN = 1024
_SHORT = 10


@dataclass(frozen=True)
class Sample:
    """One chosen row: its number in the data set, and either its text or its chat messages."""

    row: int
    text: str | None
    messages: list[Mapping[str, Any]] | None = None


def with_defaults(source: CalibrationSource) -> CalibrationSource:
    """Fill what the built-in data set `source.name` defines and the user left out.

    Raises:
        UserError: a subset or split of a local file.
    """
    built_in = BUILT_IN.get(source.name or "", CalibrationSource(split="train"))
    own_path = source.path is not None
    is_file = own_path and looks_like_file(source.path)
    for key in ("subset", "split"):
        if is_file and getattr(source, key):
            raise UserError(
                f"dataset.{key}: {source.path} is a file, which has no {key}; remove the key", "text-key-of-file"
            )
    return replace(
        source,
        path=source.path or built_in.path,
        # Subset and split belong to the hub's data set; a path of the user's own has its own.
        subset=source.subset or (None if own_path else built_in.subset),
        split=source.split or (None if is_file else built_in.split),
        text=source.text or (None if source.is_chat else built_in.text),
    )


def choose_samples(source: CalibrationSource, nsamples: int) -> list[Sample]:
    """Choose `nsamples` rows and make their text.

    Raises:
        UserError: the file or data set cannot be read, has fewer rows, lacks a column, or a chosen row has no text.
    """
    source = with_defaults(source)
    rows = open_rows(source)
    if len(rows) < nsamples:
        raise UserError(
            f"dataset {source.path} has {len(rows)} rows, but nsamples is {nsamples}; lower nsamples",
            "text-too-few-rows",
        )
    return [make_sample(row, rows[row], source) for row in row_order(source, len(rows))[:nsamples]]


def open_rows(source: CalibrationSource) -> Rows:
    """The rows of a source whose defaults are filled in (`with_defaults`), column name to value each.

    Raises:
        UserError: the template is none, or the file or data set cannot be read.
    """
    if source.text is not None:
        template_columns(source.text, "dataset.text")
    for number, turn in enumerate(source.chat or ()):
        template_columns(turn.content, f"dataset.chat[{number}].content")
    return local_rows(source.path) if looks_like_file(source.path) else _hub_rows(source)


def row_order(source: CalibrationSource, count: int) -> list[int]:
    """The order in which rows are chosen, of a data set with `count` of them."""
    import numpy

    return numpy.random.default_rng(source.seed).permutation(count).tolist()


def encode(samples: Sequence[Sample], tokenizer: Any, seqlen: int, where: str) -> list[list[int]]:
    """Token ids of each sample, special tokens once, truncated to `seqlen`.

    Chat messages are rendered with the tokenizer's chat template, which writes its own special tokens.

    Raises:
        UserError: a chat column without a chat template, messages the template refuses, text the tokenizer cannot
            encode, or a sample without tokens.
    """
    encoded = []
    for sample in samples:
        if sample.messages is None:
            text, special = sample.text, True
        else:
            text, special = _render_chat(sample, tokenizer, where), False
        if getattr(tokenizer, "truncation_side", "right") == "right":
            text = text[: _CHARACTERS_PER_TOKEN * seqlen]
        try:
            ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=seqlen)["input_ids"]
        except (
            BaseException
        ) as error:  # tokenizers raise errors of their own kinds, and panic over a regular expression
            if not is_failure(error):
                raise
            raise UserError(
                f"{where}: its tokenizer cannot encode row {sample.row} of the data set: {brief(error)}",
                "text-not-encodable",
            ) from error
        if not ids:
            raise UserError(
                f"{where}: row {sample.row} of the data set gives no tokens: {text[:60]!r}", "text-no-tokens"
            )
        encoded.append(ids)
    return encoded


def text_doubts(source: CalibrationSource, encoded: Sequence[Sequence[int]]) -> list[str]:
    """Sentences about calibration text that is allowed but unlikely to be meant."""
    found = []
    if "test" in (source.split or "").lower():
        found.append(f"calibrating on the {source.split} split: scores on it later will not be held-out scores")
    if len(encoded) > 1 and len({tuple(ids) for ids in encoded}) == 1:
        found.append(f"all {len(encoded)} samples are the same {len(encoded[0])} tokens")
    longest = max(map(len, encoded))
    if longest < _SHORT:
        found.append(f"the longest sample has {longest} tokens; so little text says little about a model")
    return found


def micro_batches(encoded: Sequence[Sequence[int]], tokens_at_once: int, pad_id: int) -> list["MicroBatch"]:
    """Group samples of similar length into right-padded micro-batches of at most `tokens_at_once` tokens.

    A sample longer than that is a micro-batch of its own. Pads are masked.
    """
    from utils.pair.batches import MicroBatch

    groups: list[list[Sequence[int]]] = []
    for ids in sorted(encoded, key=len, reverse=True):
        if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= tokens_at_once:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return [MicroBatch.of(group, pad_id) for group in groups]


def reference_batches(
    encoded: Sequence[Sequence[int]], seqlen: int, tokens_at_once: int, pad_id: int, left: bool
) -> list["MicroBatch"]:
    """Micro-batches as the reference makes them: every sample padded to `seqlen`, pads attended and counted."""
    from utils.pair.batches import MicroBatch

    rows = []
    for ids in encoded:
        pads = [pad_id] * (seqlen - len(ids))
        rows.append([*pads, *ids] if left else [*ids, *pads])
    at_once = max(1, tokens_at_once // seqlen)
    return [MicroBatch.of(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]


def token_digest(encoded: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids, for the manifest."""
    return hashlib.sha256(repr([list(ids) for ids in encoded]).encode()).hexdigest()


def make_sample(row: int, values: Mapping[str, Any], source: CalibrationSource) -> Sample:
    """The text of one row of a source whose defaults are filled in.

    Raises:
        UserError: the row lacks a column, or has no text.
    """
    where = f"dataset {source.path}, row {row}"
    if source.messages is not None:
        messages = _column(values, source.messages, where)
        return Sample(row, None, _checked_messages(messages, f"{where}: column {source.messages!r}"))
    if source.chat is not None:
        return Sample(
            row, None, [{"role": turn.role, "content": render(turn.content, values, where)} for turn in source.chat]
        )
    template = source.text
    if template is None:
        if "text" not in values:
            raise UserError(
                f"{where}: no column 'text' (columns: {', '.join(map(str, values))}); give dataset.text",
                "text-no-column",
            )
        template = "{text}"
    text = render(template, values, where)
    if not text.strip():
        raise UserError(f"{where} is empty; remove the row or choose another seed", "text-empty")
    if not _is_unicode(text):
        raise UserError(
            f"{where} holds half of a surrogate pair, which is no character; mend the file", "text-surrogate"
        )
    return Sample(row, text)


def template_columns(template: str, key: str) -> list[str]:
    """The columns that a template names, in their order.

    Raises:
        UserError: it is no template, or names none; `key` is what to call it.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key} {template!r} is not a template: {error}", "template-invalid") from error
    names = [name for _, name, _, _ in pieces if name is not None]
    if any(not name or form or conversion for _, name, form, conversion in pieces if name is not None):
        raise UserError(
            f"{key} {template!r}: write columns as {{column}}, nothing else in the braces", "template-invalid"
        )
    if not names:
        raise UserError(f"{key} {template!r} names no column; write for example {{question}}", "template-no-column")
    return names


def render(template: str, values: Mapping[str, Any], where: str) -> str:
    """A template with the row's values in their places.

    Raises:
        UserError: the row lacks a column, or holds something else than text or a number there.
    """
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = _column(values, name, where)
        if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{where}: column {name!r} holds {_kind(value)}, not text", "text-bad-value")
        parts.append(str(value))
    return "".join(parts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_messages(messages: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not all(isinstance(item, Mapping) for item in messages):
        raise UserError(f"{where} is not a list of chat messages", "text-bad-messages")
    if not messages:
        raise UserError(f"{where} holds no messages; remove the row or choose another seed", "text-bad-messages")
    for number, item in enumerate(messages, 1):
        content = item.get("content")
        if not isinstance(item.get("role"), str) or not (isinstance(content, (str, list)) or item.get("tool_calls")):
            raise UserError(
                f"{where}, message {number} must have a role and a content, both text; it has {', '.join(map(str, item))}",
                "text-bad-messages",
            )
    return [dict(item) for item in messages]


def _column(values: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in values:
        raise UserError(f"{where}: no column {name!r} (columns: {', '.join(map(str, values))})", "text-no-column")
    return values[name]


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return "nothing (null)" if value is None else f"a {type(value).__name__}"


def _render_chat(sample: Sample, tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: its tokenizer has no chat template; give dataset.text instead",
            "text-no-chat-template",
        )
    try:
        text = tokenizer.apply_chat_template(sample.messages, tokenize=False)
    except Exception as error:  # templates raise errors of their own kinds
        raise UserError(
            f"{where}: the chat template refuses row {sample.row}: {brief(error)}", "text-chat-refused"
        ) from error
    if not _is_unicode(text):
        raise UserError(
            f"{where}: row {sample.row} holds half of a surrogate pair, which is no character", "text-surrogate"
        )
    return text


def _hub_rows(source: CalibrationSource) -> Rows:
    from datasets import load_dataset

    shown = f"dataset {source.path}" + (f" ({source.subset})" if source.subset else "")
    try:
        return load_dataset(source.path, name=source.subset, split=source.split)
    except Exception as error:  # the hub, the network, the cache and the builders raise errors of many kinds
        raise UserError(
            f"{shown}, split {source.split}: cannot be loaded: {brief(error)}. For a local file give dataset.path its name",
            "text-not-loadable",
        ) from error
