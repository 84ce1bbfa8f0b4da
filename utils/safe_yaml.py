"""Reading a YAML file that somebody else wrote: plain data only, bounded, duplicate keys refused."""

import contextlib
import itertools
import math
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from utils.bounded_files import read_stream
from utils.errors import UserError

MAX_BYTES = 8 * 2**20
MAX_ALIASES = 100
MAX_NODES = (
    400_000  # values, keys, lists and mappings, with aliases written out; a recipe for 20,000 experts has 300,000
)
MAX_DEPTH = 40
_MOST_VALUES = 10_000
_TOO_LARGE = 10**40  # whole numbers from 10**309 on are no floating-point numbers
_MERGE_TAG = "tag:yaml.org,2002:merge"
_TEXT_TAG = "tag:yaml.org,2002:str"
_SAFE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml reads ten times as fast, where PyYAML was built with it


def _check_bounds(text: str) -> None:
    """Refuse what grows without bounds, before anything is built of it; libyaml's own composer has no bounds.

    Aliases count with all that they stand for: nested ones grow exponentially, and one inside its own anchor endlessly.
    """
    sizes: dict[str, tuple[int, int]] = {}  # of each finished anchor: nodes, and levels below it
    open_ones: list[list[Any]] = []  # anchor, nodes before it, and the greatest depth inside
    named = set()  # anchors, those of what is open included
    nodes = aliases = 0
    for event in yaml.parse(text, Loader=_SAFE):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before, reached = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before, reached - len(open_ones) - 1
            if open_ones:
                open_ones[-1][2] = max(open_ones[-1][2], reached)
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        line, anchor = event.start_mark.line + 1, event.anchor
        added, reached = 1, len(open_ones) + 1
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MAX_ALIASES:
                raise UserError(f"more than {MAX_ALIASES} YAML aliases: write the values out", "yaml-aliases")
            if anchor not in named:
                raise ComposerError(None, None, f"found undefined alias {anchor!r}", event.start_mark)
            if anchor not in sizes:
                raise UserError(f"line {line}: *{anchor} refers to what contains it: write it out", "yaml-recursive")
            added, levels = sizes[anchor]
            reached += levels
        elif anchor is not None:
            named.add(anchor)
            if isinstance(event, yaml.ScalarEvent):
                sizes[anchor] = 1, 0
        nodes += added
        if nodes > MAX_NODES:
            raise UserError(
                f"line {line}: more than {MAX_NODES} values, counting what aliases stand for: is it the right file?",
                "yaml-too-many",
            )
        if reached > MAX_DEPTH:
            raise UserError(f"line {line}: nested too deeply (more than {MAX_DEPTH} levels)", "yaml-too-deep")
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append([anchor, nodes - 1, reached])
        elif open_ones:
            open_ones[-1][2] = max(open_ones[-1][2], reached)


class _Loader(_SAFE):
    """Plain nodes from a text within bounds (`_check_bounds`)."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._tags: dict[tuple[str, tuple[bool, bool]], str] = {}

    def resolve(self, kind, value, implicit):
        if kind is not yaml.ScalarNode:
            return super().resolve(kind, value, implicit)
        key = value, implicit
        if key not in self._tags:  # a recipe has the same few keys thousands of times
            self._tags[key] = super().resolve(kind, value, implicit)
        return self._tags[key]


class _StrictLoader(_Loader):
    """A loader of plain data that also refuses what YAML 1.1 would quietly read as something else.

    These are duplicate keys (the last one wins) and numbers such as 010 (octal, 8) or 1:30 (base 60, 90).
    """

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
        if node.tag != "tag:yaml.org,2002:int":
            return self.construct_yaml_float(node)
        if abs(value := self.construct_yaml_int(node)) >= _TOO_LARGE:
            raise UserError(f"line {node.start_mark.line + 1}: {text[:20]}... is too large a number", "yaml-bad-value")
        return value


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
    return yaml_mapping(read_text(path, what, max_bytes), f"{what} {path}")


def yaml_mapping(text: str, where: str) -> dict[Any, Any]:
    """The one mapping that a YAML text must hold, as `read_yaml_mapping`; `where` begins a message.

    Raises:
        UserError: it is not YAML, holds tags that would run code, duplicate keys or too many aliases, or is not a mapping.
    """
    with _named_problems(where):
        _check_bounds(text)
        data = yaml.load(text, Loader=_StrictLoader)
    if data is None:
        raise UserError(f"{where} is empty", "yaml-empty")
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise UserError(f"{where} must be a mapping of keys to values, but holds a {kind}", "yaml-no-mapping")
    return data


def yaml_nodes(text: str, where: str) -> yaml.Node | None:
    """The tree of nodes of a text, with the places where they stand in it, bounded as in `read_yaml_mapping`.

    Raises:
        UserError: it is not YAML, or too much of it; `where` begins the message.
    """
    with _named_problems(where):
        _check_bounds(text)
        return yaml.compose(text, Loader=_Loader)


def top_level_text(text: str, keys: Container[str], where: str) -> dict[str, list[str]]:
    """What some keys of a mapping hold, where that is text or a list of texts; nothing is made of the others.

    Args:
        text: the YAML of a mapping; of anything else nothing is found. Of a key that stands there twice the last counts.
        keys: their names.
        where: begins the message.

    Returns:
        The texts by key; a text alone as a list of one.

    Raises:
        UserError: as `yaml_nodes`.
    """
    root = yaml_nodes(text, where)
    found = {}
    for key, node in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.tag == _TEXT_TAG and key.value in keys:
            parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
            found[key.value] = [part.value for part in parts] if all(part.tag == _TEXT_TAG for part in parts) else []
    return found


def holds_several_documents(text: str) -> bool:
    """Whether a YAML text goes on after its first document, as far as it is YAML."""
    if not re.search(r"^---(?:\s|$)", text, flags=re.M):
        return False
    try:
        events = itertools.islice(yaml.parse(text, Loader=_SAFE), 2 * MAX_NODES)
        return sum(isinstance(event, yaml.DocumentStartEvent) for event in events) > 1
    except yaml.YAMLError:
        return False  # which is said when the data is read


@contextlib.contextmanager
def _named_problems(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}", error.code) from error
    except (yaml.YAMLError, ValueError) as error:
        problem = _one_line(error)
        if "nesting depth" in problem:  # libyaml's own limit, far above ours, met while it looks ahead
            raise UserError(f"{where}: nested too deeply (more than {MAX_DEPTH} levels)", "yaml-too-deep") from error
        raise UserError(f"{where} is not valid YAML: {problem}", "yaml-invalid") from error


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 text file (a byte-order mark is dropped) or raise a `UserError` that names it.

    A pipe will do, such as a shell's `<(...)`, as long as its writer does not let it wait (`read_stream`).
    """
    try:
        if path.is_dir():
            raise UserError(f"{what} {path} is a folder; give the file", "file-is-folder")
        content = read_stream(path, max_bytes + 1)  # not by the size it claims: devices and pipes claim 0
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
    except TimeoutError as error:
        raise UserError(f"{what} {path} is a pipe, and {error}; give a file", "file-no-data") from error
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
