"""A row of a data set becomes text: by a template, or from its chat messages."""

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.pair.source import CalibrationSource


@dataclass(frozen=True)
class Sample:
    """One chosen row: its number in the data set, and either its text or its chat messages."""

    row: int
    text: str | None
    messages: list[Mapping[str, Any]] | None = None


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
    if not is_unicode(text):
        raise UserError(
            f"{where} holds half of a surrogate pair, which is not a character; correct the file", "text-surrogate"
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


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, so that it can be encoded."""
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
