"""A merge recipe as somebody wrote it: read, and checked as far as that goes without mergekit.

mergekit ignores what it does not know, so that a slip of the pen changes a merge without a word. Here the values are
checked (in milliseconds); `utils/merging/recipe_schema.py` checks the names against mergekit itself (which takes seconds to
import).
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError, raise_collected
from utils.safe_yaml import read_text, read_yaml_mapping

INPUT_KEYS = ("models", "slices", "modules")
_MODEL_KEYS = ("model", "base_model", "path", "tokenizer_source", "source")
_SHARES = ("density", "select_topk")  # parameters that are shares of a tensor's entries


@dataclass(frozen=True)
class MergeRecipe:
    """A recipe file: where it is, its text as written and the plain data in it."""

    path: Path
    text: str = field(repr=False)
    data: Mapping[str, Any] = field(repr=False)

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return f"merge recipe {self.path}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the text, as lower-case hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def local_folders(self) -> list[tuple[str, Path]]:
        """The models that are folders here, as far as plain names tell: name and folder."""
        names = dict.fromkeys(model_names(self.data))
        return [(name, Path(name).expanduser()) for name in names if os.path.isdir(os.path.expanduser(name))]


def read_recipe(path: Path) -> MergeRecipe:
    """Read a merge recipe and check its outline and its numbers.

    Raises:
        UserError: not a readable YAML mapping; no merge method; not exactly one of `models`, `slices` and `modules`;
            numbers that are not finite, densities outside [0, 1]. All problems are reported together.
    """
    data = read_yaml_mapping(path, "merge recipe")
    return checked_recipe(path, read_text(path, "merge recipe"), data)


def checked_recipe(path: Path, text: str, data: Mapping[str, Any]) -> MergeRecipe:
    """A recipe from its text and the data in it, checked as `read_recipe` checks one; nothing is read.

    Raises:
        UserError: as `read_recipe`; `path` is what to call it.
    """
    if "model_info" in data:
        raise UserError(f"merge recipe {path} is a pair config; give the recipe that lewis_merge.py made of it")
    problems = []
    if not isinstance(data.get("merge_method"), str):
        problems.append(f"merge_method must name a method, e.g. ties, got {data.get('merge_method')!r}")
    present = [key for key in INPUT_KEYS if data.get(key)]
    if len(present) != 1:
        got = " and ".join(present) if present else "none of them"
        problems.append(f"needs exactly one of models, slices and modules, got {got}")
    for where, parameters in _parameter_blocks(data, ""):
        for name, value in parameters.items():
            problems += [f"{where}.{name}: {slip}" for slip in _value_slips(str(name), value)]
    raise_collected(problems, f"merge recipe {path}")
    return MergeRecipe(path, text, data)


def model_names(node: Any) -> Iterator[str]:
    """Every text under the keys by which mergekit knows models."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in _MODEL_KEYS and isinstance(value, str) and "\0" not in value:
                yield value
            else:
                yield from model_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from model_names(value)


def _parameter_blocks(node: Any, where: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every `parameters` mapping of a recipe with its place in it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            inner = f"{where}.{key}" if where else str(key)
            if key == "parameters" and isinstance(value, Mapping):
                yield inner, value
            else:
                yield from _parameter_blocks(value, inner)
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _parameter_blocks(value, f"{where}[{place}]")


def _value_slips(name: str, setting: Any) -> Iterator[str]:
    """What is wrong with the numbers of one parameter: a scalar, a gradient, or `{filter, value}` entries."""
    if setting is None:
        yield "has no value"
    elif isinstance(setting, Mapping):
        if "value" in setting:
            at = f"filter {setting['filter']!r}: " if setting.get("filter") is not None else ""
            yield from (at + slip for slip in _value_slips(name, setting["value"]))
        else:
            yield f"{dict(setting)!r} has no value"
    elif isinstance(setting, list):
        for item in setting:
            yield from _value_slips(name, item)
    elif not isinstance(setting, bool):
        number = _as_number(setting)
        if number is not None and not math.isfinite(number):
            yield f"{setting!r} is not a finite number"
        elif number is not None and name in _SHARES and not 0 <= number <= 1:
            yield f"{setting!r} is outside [0, 1]"
        elif number is None and name in (*_SHARES, "weight"):
            yield f"{setting!r} is not a number"


def _as_number(value: Any) -> float | None:
    """A number, or text that mergekit would read as one (YAML reads `1e-3` as text)."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
