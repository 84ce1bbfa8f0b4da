"""What a mistyped name was probably meant to be, for messages."""

import difflib
from collections.abc import Iterable
from typing import Any

_LONGEST = 80  # characters that are compared


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like another one, None if none is like it."""
    return next(iter(difflib.get_close_matches(str(name)[:_LONGEST], list(known), n=1, cutoff=cutoff)), None)


def suggestion(name: Any, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """The question whether the nearest known name was meant; `otherwise` if none is like it."""
    near = nearest(name, known, cutoff)
    return f"did you mean {near!r}?" if near else otherwise


def as_written(name: str) -> str:
    """A name of a merge method in mergekit's spelling: lower case, underscores."""
    return name.lower().replace("-", "_")
