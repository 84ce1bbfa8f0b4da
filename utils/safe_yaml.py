"""Reading a YAML file that somebody else wrote: plain data only, bounded, duplicate keys refused."""

from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

MAX_BYTES = 8 * 2**20
MAX_ALIASES = 100


class _StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses duplicate keys (PyYAML keeps the last one silently) and alias bombs."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise UserError(f"more than {MAX_ALIASES} YAML aliases: write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise UserError(f"line {key_node.start_mark.line + 1}: a key must be plain text")
            if key in seen:
                raise UserError(
                    f"line {key_node.start_mark.line + 1}: key {key!r} is given twice (first in line {seen[key]})"
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def read_yaml_mapping(path: Path, what: str) -> dict[Any, Any]:
    """Read a YAML file that must hold one mapping.

    Args:
        path: the file.
        what: what the file is to the user ("pair config", "merge recipe"), for messages.

    Raises:
        UserError: the file is missing, not a file, unreadable, too large, not UTF-8, not YAML, holds tags that would
            run code, duplicate keys or too many aliases, or is not a mapping.
    """
    text = read_text(path, what)
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    except RecursionError:
        raise UserError(f"{what} {path}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {_one_line(error)}") from None
    if data is None:
        raise UserError(f"{what} {path} is empty")
    if not isinstance(data, dict):
        raise UserError(f"{what} {path} must be a mapping of keys to values, but holds a {type(data).__name__}")
    return data


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 text file (a byte-order mark is dropped) or raise a `UserError` that names it."""
    try:
        if path.is_dir():
            raise UserError(f"{what} {path} is a folder; give the file")
        if path.stat().st_size > max_bytes:
            raise UserError(f"{what} {path} is larger than {max_bytes >> 20} MiB: is it the right file?")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except PermissionError:
        raise UserError(f"{what} {path} cannot be read: permission denied") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {str(path)!r} cannot be read: {error}") from None


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)
