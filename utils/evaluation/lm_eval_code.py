"""What of lm-eval's task files would run code of a stranger's: found in the files, before lm-eval makes anything of them.

A file's `!function` names a Python function, which is imported; a metric of Hugging Face evaluate's is a script. Templates
could reach whatever Python holds: they run in Jinja's sandbox. Files that come with lm-eval, and with this project, are not
looked at.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.safe_yaml import read_text, yaml_nodes

_OURS = Path(__file__).resolve().parent / "accuracy"
_PLAIN = "tag:yaml.org,2002:"
_MOST_FILES = 10_000


def runs_templates_in_a_sandbox() -> None:
    """Have lm-eval render the templates of tasks where they see no more than the row."""
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found = lm_eval.utils.env
    if not found.sandboxed:
        sandbox = ImmutableSandboxedEnvironment(
            loader=found.loader, undefined=found.undefined, keep_trailing_newline=found.keep_trailing_newline
        )
        sandbox.filters |= found.filters
        lm_eval.utils.env = sandbox


def code_in(names: Iterable[str], index: Mapping[str, Any]) -> Iterator[str]:
    """What of the files of some tasks, of what they include and of the tasks of a group, runs code: clauses that name it.

    Args:
        names: tasks, groups and tags of the index.
        index: lm-eval's, by name.

    Raises:
        UserError: a file is unreadable, no YAML, or unbounded.
    """
    import lm_eval

    trusted = (_OURS, Path(lm_eval.__file__).resolve().parent)
    waiting: list[str | Path] = list(names)
    seen: set[str | Path] = set()
    while waiting and len(seen) < _MOST_FILES:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if isinstance(one, str):
            entry = index.get(one)
            waiting += [entry.yaml_path.resolve()] if entry is not None and entry.yaml_path else []
            waiting += entry.tags if entry is not None and not entry.yaml_path else ()
        elif not any(folder in one.parents for folder in trusted):
            root = nodes_of(one)
            yield from _code(one, root)
            waiting += [(one.parent / text).resolve() for text in _texts(root, "include")]
            waiting += _texts(root, "task")


def nodes_of(path: Path) -> yaml.Node | None:
    """The nodes of a task file, whose values are not made: lm-eval has tags of its own.

    Raises:
        UserError: there is no such file, it is not YAML, or too much of it.
    """
    try:
        return yaml_nodes(read_text(path, "lm-eval task"), f"lm-eval task {path}")
    except UserError as error:
        raise UserError(str(error), "lm-eval-unreadable") from error


def _code(path: Path, root: yaml.Node | None) -> Iterator[str]:
    for key, node in _pairs(root):
        if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python"):
            yield f"{path} has {key or 'a value'}: {node.tag.removeprefix(_PLAIN)} {_shown(node)}"
        elif key == "hf_evaluate" and _shown(node).lower() == "true":
            yield f"{path} has a metric of Hugging Face evaluate's, which is a script"
        elif key == "metric" and isinstance(node, yaml.ScalarNode) and _is_place(node.value):
            yield f"{path} has metric: {_shown(node)}"


def _texts(root: yaml.Node | None, key: str) -> list[str]:
    """All texts below a key, wherever it stands."""
    below = [node for name, node in _pairs(root) if name == key]
    return [part.value for node in below for _, part in _pairs(node) if isinstance(part, yaml.ScalarNode)]


def _pairs(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Every node below one, itself first, with the key that it stands under."""
    waiting = [("", root)] if root is not None else []
    while waiting:
        key, node = waiting.pop()
        yield key, node
        if isinstance(node, yaml.SequenceNode):
            waiting += [(key, part) for part in node.value]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(str(name.value), part) for name, part in node.value]


def _is_place(text: str) -> bool:
    """Whether a metric's name may lead to a script, here or on the hub."""
    return "/" in text or os.path.exists(text)


def _shown(node: yaml.Node) -> str:
    return node.value[:60] if isinstance(node, yaml.ScalarNode) else "..."
