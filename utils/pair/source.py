"""One source of calibration text, as the pair config writes it: a name (`gsm8k`), or a mapping with a path and columns."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.plain_values import is_homeless, is_text, quote_hint, show

DATASET_NAMES = ("gsm8k", "mbpp")
DATASET_KEYS = ("name", "path", "subset", "split", "text", "messages", "seed", "seqlen")
MAX_SEED = 2**32 - 1
MAX_SEQLEN = 1_048_576


@dataclass(frozen=True)
class CalibrationSource:
    """Where calibration text comes from. `name` selects built-in defaults; the other fields override them."""

    name: str | None = None
    path: str | None = None
    subset: str | None = None
    split: str | None = None
    text: str | None = None
    messages: str | None = None
    seed: int = 42
    seqlen: int = 512

    @property
    def shown(self) -> str:
        """What to call it in a line of print."""
        return self.path or self.name or "nothing"


def read_source(raw: Any, key: str, seed: int, seqlen: int, problems: list[str]) -> CalibrationSource:
    """Read the value of `dataset`, or of one type under `calibration`.

    Args:
        raw: the value: a name or a mapping.
        key: its key, for messages.
        seed, seqlen: what holds if the mapping does not say.
        problems: gains a sentence per mistake.
    """
    if is_text(raw):
        raw = {"name": raw}
    if not isinstance(raw, dict):
        problems.append(f"{key} must be a name ({', '.join(DATASET_NAMES)}) or a mapping, got {show(raw)}")
        return CalibrationSource(name="mbpp")
    problems += unknown_keys(raw, DATASET_KEYS, f"{key}.")
    texts: dict[str, str | None] = {}
    for field in ("name", "path", "subset", "split", "text", "messages"):
        value = raw.get(field)
        plain = re.sub(r"[\n\t]", " ", value) if field == "text" and isinstance(value, str) else value
        if value is not None and not is_text(plain):
            problems.append(f"{key}.{field} must be text{quote_hint(value)}, got {show(value)}")
            value = None
        texts[field] = value
    if texts["path"] and is_homeless(texts["path"]):
        problems.append(f"{key}.path {texts['path']!r}: no such user's home folder; write the full path")
    if texts["name"] is not None and texts["name"] not in DATASET_NAMES:
        near = difflib.get_close_matches(texts["name"], DATASET_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"for text of your own write {key}: {{path: ..., text: ...}}"
        problems.append(f"{key} {texts['name']!r} is unknown (known: {', '.join(DATASET_NAMES)}); {hint}")
    if raw.get("name") is None and raw.get("path") is None:
        problems.append(f"{key} needs a name or a path")
    if texts["text"] is not None and texts["messages"] is not None:
        problems.append(f"{key}: give text (a template) or messages (a chat column), not both")
    return CalibrationSource(
        seed=read_whole(raw, "seed", seed, 0, MAX_SEED, problems, f"{key}."),
        seqlen=read_whole(raw, "seqlen", seqlen, 2, MAX_SEQLEN, problems, f"{key}."),
        **texts,
    )


def read_whole(
    mapping: Mapping[Any, Any], key: str, default: int, low: int, high: int, problems: list[str], where: str = ""
) -> int:
    """A whole number from `low` to `high`, or the default and a sentence in `problems`."""
    value = mapping.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        problems.append(f"{where}{key} must be a whole number from {low} to {high}, got {show(value)}")
        return default
    return value


def unknown_keys(mapping: Mapping[Any, Any], known: tuple[str, ...], where: str) -> list[str]:
    """A sentence for each key that is not known, with the nearest one that is."""
    found = []
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:80], known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            found.append(f"unknown key {where}{show(key)}; {hint}")
    return found
