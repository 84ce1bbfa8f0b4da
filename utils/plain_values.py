"""Values that come out of a YAML file: what kind they are, and how to show them in a message."""

import math
import os
import reprlib
from typing import Any

_MOST_VALUES = 10_000


def is_text(value: Any) -> bool:
    """Whether a value is text that can be a name: not blank, one line, no control characters."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def is_homeless(path: str) -> bool:
    """Whether a path begins with a `~` that stands for no known home folder."""
    return path.startswith("~") and os.path.expanduser(path) == path


def is_plain_data(value: Any) -> bool:
    """Whether a value is finite and small enough to be copied into a recipe (aliases can make it endless)."""
    pending, seen = [value], 0
    while pending:
        item, seen = pending.pop(), seen + 1
        if isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += [*item, *item.values()]
        elif not isinstance(item, (bool, int, str)) and not (isinstance(item, float) and math.isfinite(item)):
            return False
        if seen + len(pending) > _MOST_VALUES:
            return False
    return True


def quote_hint(value: Any) -> str:
    """The remedy where text was wanted and YAML read something else, in brackets; empty if it is no such case."""
    if isinstance(value, bool):
        return " (YAML reads yes/no/on/off as booleans: put it in quotes)"
    return " (put it in quotes)" if isinstance(value, (int, float)) else ""


def show(value: Any) -> str:
    """A value for a message: its repr, at most 80 characters long."""
    if value is None:
        return "nothing"
    short = reprlib.Repr()  # bounded in depth and width: with aliases a value's plain repr can be exponentially long
    short.maxlevel, short.maxstring, short.maxother = 3, 78, 78
    text = short.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
