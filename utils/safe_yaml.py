"""Reading a YAML file that somebody else wrote: plain data only, bounded, duplicate keys refused."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

MAX_BYTES = 8 * 2**20
MAX_ALIASES = 100
_MOST_VALUES = 10_000
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses alias bombs and what YAML 1.1 would quietly read as something else.

    These are duplicate keys (the last one wins) and numbers such as 010 (octal, 8) or 1:30 (base 60, 90).
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise UserError(f"more than {MAX_ALIASES} YAML aliases: write the values out", "yaml-aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE_TAG:
                raise UserError(f"line {line}: merge keys (<<) are not supported: write the keys out", "yaml-merge-key")
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"line {line}: a key must be plain text", "yaml-bad-key")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError(
                    f"line {line}: key {key!r} is given twice (first in line {seen[key]})", "yaml-key-twice"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # PyYAML lets bare errors out where a value contradicts its form or its tag (2026-13-01, `!!bool x`).
            kind = node.tag.rpartition(":")[2]
            shown = node.value[:60] if isinstance(node, yaml.ScalarNode) else node.id
            raise UserError(
                f"line {node.start_mark.line + 1}: {shown!r} is not a valid {kind}", "yaml-bad-value"
            ) from error

    def construct_plain_number(self, node):
        text = self.construct_scalar(node)
        if re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", text):
            raise UserError(
                f"line {node.start_mark.line + 1}: {text} is read as octal or base 60: write a plain number",
                "yaml-octal",
            )
        is_int = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_plain_number)


def read_yaml_mapping(path: Path, what: str, max_bytes: int = MAX_BYTES) -> dict[Any, Any]:
    """Read a YAML file that must hold one mapping.

    Args:
        path: the file.
        what: what the file is to the user ("pair config", "merge recipe"), for messages.
        max_bytes: what a file of this kind never exceeds (parsing takes seconds per MiB).

    Raises:
        UserError: the file is missing, not a file, unreadable, too large, not UTF-8, not YAML, holds tags that would
            run code, duplicate keys or too many aliases, or is not a mapping.
    """
    text = read_text(path, what, max_bytes)
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except UserError as error:
        raise UserError(f"{what} {path}: {error}", error.code) from error
    except RecursionError as error:
        raise UserError(f"{what} {path}: nested too deeply", "yaml-too-deep") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {_one_line(error)}", "yaml-invalid") from error
    if data is None:
        raise UserError(f"{what} {path} is empty", "yaml-empty")
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise UserError(f"{what} {path} must be a mapping of keys to values, but holds a {kind}", "yaml-no-mapping")
    return data


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 text file (a byte-order mark is dropped) or raise a `UserError` that names it."""
    try:
        if path.is_dir():
            raise UserError(f"{what} {path} is a folder; give the file", "file-is-folder")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)  # not by the size it claims: devices and pipes claim 0
        if len(content) > max_bytes:
            limit = max_bytes >> 20
            raise UserError(f"{what} {path} is larger than {limit} MiB: is it the right file?", "file-too-large")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} does not exist", "file-missing") from error
    except PermissionError as error:
        raise UserError(f"{what} {path} cannot be read: permission denied", "file-unreadable") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start})", "file-not-utf8") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {str(path)!r} cannot be read: {why}", "file-unreadable") from error


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)


def is_plain_data(value: Any) -> bool:
    """Whether a value is finite and small enough to be copied into another file (aliases can make it endless)."""
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
