"""Where calibration text comes from, and how it becomes token batches.

Rows come from a hub data set or a local file; `nsamples` of them are chosen by the permutation that
`datasets.Dataset.shuffle(seed)` uses, so that a local copy of a hub data set yields the same samples.
"""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.pair_config import CalibrationSource
from utils.rows import local_rows, looks_like_file

if TYPE_CHECKING:
    from utils.block_runner import MicroBatch

# The reference's data sets and text format (arXiv 2503.03874, released code).
BUILT_IN = {
    "gsm8k": CalibrationSource(path="openai/gsm8k", subset="main", split="train", text="{question} {answer}"),
    "mbpp": CalibrationSource(path="google-research-datasets/mbpp", subset="full", split="train", text="{text} {code}"),
}


@dataclass(frozen=True)
class Sample:
    """One chosen row: its number in the data set, and either its text or its chat messages."""

    row: int
    text: str | None
    messages: list[Mapping[str, Any]] | None = None


def with_defaults(source: CalibrationSource) -> CalibrationSource:
    """Fill what the built-in data set `source.name` defines and the user left out."""
    built_in = BUILT_IN.get(source.name or "", CalibrationSource(split="train"))
    own_path = source.path is not None
    return replace(
        source,
        path=source.path or built_in.path,
        # Subset and split belong to the hub's data set; a path of the user's own has its own.
        subset=source.subset or (None if own_path else built_in.subset),
        split=source.split or built_in.split,
        text=source.text or (None if source.messages else built_in.text),
    )


def choose_samples(source: CalibrationSource, nsamples: int) -> list[Sample]:
    """Choose `nsamples` rows and make their text.

    Raises:
        UserError: the file or data set cannot be read, has fewer rows, lacks a column, or a chosen row has no text.
    """
    import numpy

    source = with_defaults(source)
    rows = local_rows(source.path) if looks_like_file(source.path) else _hub_rows(source)
    if len(rows) < nsamples:
        raise UserError(f"dataset {source.path} has {len(rows)} rows, but nsamples is {nsamples}; lower nsamples")
    order = numpy.random.default_rng(source.seed).permutation(len(rows))[:nsamples]
    return [_sample(int(row), rows[int(row)], source) for row in order]


def encode(samples: Sequence[Sample], tokenizer: Any, seqlen: int, where: str) -> list[list[int]]:
    """Token ids of each sample, special tokens once, truncated to `seqlen`.

    Chat messages are rendered with the tokenizer's chat template, which writes its own special tokens.

    Raises:
        UserError: a chat column without a chat template, messages the template refuses, or a sample without tokens.
    """
    encoded = []
    for sample in samples:
        if sample.messages is None:
            text, special = sample.text, True
        else:
            text, special = _render_chat(sample, tokenizer, where), False
        ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=seqlen)["input_ids"]
        if not ids:
            raise UserError(f"{where}: row {sample.row} of the data set gives no tokens: {text[:60]!r}")
        encoded.append(ids)
    return encoded


def micro_batches(encoded: Sequence[Sequence[int]], tokens_at_once: int, pad_id: int) -> list["MicroBatch"]:
    """Group samples of similar length into right-padded micro-batches of at most `tokens_at_once` tokens.

    A sample longer than that is a micro-batch of its own. Pads are masked.
    """
    from utils.block_runner import MicroBatch

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
    from utils.block_runner import MicroBatch

    rows = []
    for ids in encoded:
        pads = [pad_id] * (seqlen - len(ids))
        rows.append([*pads, *ids] if left else [*ids, *pads])
    at_once = max(1, tokens_at_once // seqlen)
    return [MicroBatch.of(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]


def token_digest(encoded: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids, for the manifest."""
    return hashlib.sha256(repr([list(ids) for ids in encoded]).encode()).hexdigest()


def _sample(row: int, values: Mapping[str, Any], source: CalibrationSource) -> Sample:
    where = f"dataset {source.path}, row {row}"
    if source.messages is not None:
        messages = _column(values, source.messages, where)
        if not isinstance(messages, (list, tuple)) or not all(isinstance(item, Mapping) for item in messages):
            raise UserError(f"{where}: column {source.messages!r} is not a list of chat messages")
        return Sample(row, None, [dict(item) for item in messages])
    template = source.text
    if template is None:
        if "text" not in values:
            raise UserError(f"{where}: no column 'text' (columns: {', '.join(map(str, values))}); give dataset.text")
        template = "{text}"
    text = "".join(_template_parts(template, values, where))
    if not text.strip():
        raise UserError(f"{where} is empty; remove the row or choose another seed")
    return Sample(row, text)


def _template_parts(template: str, values: Mapping[str, Any], where: str) -> list[str]:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"dataset.text {template!r} is not a template: {error}") from None
    parts = []
    for literal, name, form, conversion in pieces:
        parts.append(literal)
        if name is None:
            continue
        if not name or form or conversion:
            raise UserError(f"dataset.text {template!r}: write columns as {{column}}, nothing else in the braces")
        value = _column(values, name, where)
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: column {name!r} holds {_kind(value)}, not text")
        parts.append(str(value))
    if not any(name for _, name, _, _ in pieces):
        raise UserError(f"dataset.text {template!r} names no column; write for example {{question}}")
    return parts


def _column(values: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in values:
        raise UserError(f"{where}: no column {name!r} (columns: {', '.join(map(str, values))})")
    return values[name]


def _kind(value: Any) -> str:
    return "nothing (null)" if value is None else f"a {type(value).__name__}"


def _render_chat(sample: Sample, tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where}: its tokenizer has no chat template; use dataset.text instead of dataset.messages")
    try:
        return tokenizer.apply_chat_template(sample.messages, tokenize=False)
    except Exception as error:  # templates raise errors of their own kinds
        raise UserError(f"{where}: the chat template refuses row {sample.row}: {error}") from None


def _hub_rows(source: CalibrationSource) -> Sequence[Mapping[str, Any]]:
    from datasets import load_dataset

    shown = f"dataset {source.path}" + (f" ({source.subset})" if source.subset else "")
    try:
        return load_dataset(source.path, name=source.subset, split=source.split)
    except Exception as error:  # the hub, the network, the cache and the builders raise errors of many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{shown}, split {source.split}: cannot be loaded: {first}. For a local file give dataset.path its name"
        ) from None
