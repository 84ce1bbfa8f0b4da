"""The commands that a command gives its user to paste next: this interpreter, paths that are right from here."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_INDENT = "  "
_WIDTH = 110  # characters of a line, where words allow


def next_command(
    script: str,
    flags: Mapping[str, object],
    arguments: Sequence[object] = (),
    *,
    interpreter: str | None = None,
) -> str:
    """A command line of this project, quoted for a shell, broken into lines.

    Args:
        script: a command's path in the project, such as `utils/merger.py`.
        flags: values by flag name without dashes; True is the flag alone, None and False leave it out.
        arguments: what follows the flags.
        interpreter: the running one if None.
    """
    words = [shlex.quote(python_name(interpreter or sys.executable)) + " " + shlex.quote(script_path(script))]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}")
    words += [shlex.quote(str(argument)) for argument in arguments]
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) < _WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return _INDENT + f" \\\n{_INDENT * 2}".join(lines)


def python_name(executable: str) -> str:
    """What to type for an interpreter: its name where the shell finds this very one by it, else its path from here."""
    for name in ("python3", "python"):
        found = shutil.which(name)
        if found and Path(found).parent == Path(executable).parent and os.path.samefile(found, executable):
            return name
    return from_here(Path(executable)) if executable else "python3"


def script_path(script: str) -> str:
    """Where a command of this project is, seen from the current folder."""
    return from_here(ROOT / script)


def from_here(path: Path) -> str:
    """A path relative to the current folder where that is not longer than the absolute one; links are left as they are."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return relative if len(relative) <= len(absolute) else absolute
