"""The hidden folders beside a target: what they are called, whether they are ours, and what of dead runs becomes of them.

A run works in `.NAME.TOKEN.part`; what it replaces may lie in `.NAME.TOKEN.old` for a moment. The token is the key of what
is made, 12 hexadecimal digits, and 8 more of a hash of the target's whole name and the key. So a folder that somebody else
called in such a way, by a date say, is none of ours, and neither is that of another target whose long name begins alike.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.publishing.disk import bytes_on_disk, remove_tree

PROGRESS = ".progress"  # a file in a stage that says what is finished there; without it nothing in a dead stage is used
_KEY, _CHECK = 12, 8  # hexadecimal digits
_LONGEST = 100  # bytes of a target's name that are shown in a sibling's; some systems take no names above 143
_ONCE_LONGEST = 64  # characters of it that earlier versions showed
_FORM = re.compile(r"([0-9a-f]+)\.(part|old)")


def stage_of(target: Path, key: str) -> Path:
    """The folder that a run works in which makes `target`; `key` names what is made, in hexadecimal."""
    target = Path(os.path.realpath(target))
    return target.with_name(f"{_shown(target.name)}{_token(target.name, key)}.part")


def refuse_parallel_run(target: Path, key: str | None = None) -> None:
    """Raise a `UserError` if another run is making this folder, unless with the same key."""
    own = None if key is None else stage_of(target, key)
    if any(_is_held(folder) for folder in _siblings(target, "part") if folder != own):
        raise UserError(f"{target} is being written by another run; wait for it or choose another folder", "out-in-use")


def put_back(target: Path) -> str:
    """Undo half an exchange of a killed run; a sentence if there was one."""
    target = Path(os.path.realpath(target))
    for retired in _siblings(target, "old"):
        if not os.path.lexists(target) and not _is_held(retired):
            os.rename(retired, target)
            return f"a run was killed while it replaced {target}: what was there is back"
    return ""


def sweep(target: Path, key: str | None = None) -> str:
    """Remove what dead runs have left beside a target, but for that of the same key; a sentence if there was something."""
    target = Path(os.path.realpath(target))
    own = None if key is None else stage_of(target, key)
    dead = [folder for folder in _siblings(target, "part", "old") if folder != own and not _is_held(folder)]
    if not dead or (any(folder.suffix == ".old" for folder in dead) and not os.path.lexists(target)):
        return ""
    removed = [str(folder) for folder in dead if remove_tree(folder)]
    return f"removed what a killed run has left: {', '.join(removed)}" if removed else ""


def dead_bytes(target: Path) -> int:
    """What dead runs have left beside a target, in bytes of its disk."""
    return sum(bytes_on_disk(folder) for folder in _siblings(target, "part", "old") if not _is_held(folder))


def _shown(name: str) -> str:
    """How the name of a sibling begins; of a long target name the end is left out."""
    encoded = os.fsencode(name)
    return f".{name if len(encoded) <= _LONGEST else encoded[:_LONGEST].decode(errors='ignore')}."


def _token(name: str, key: str) -> str:
    key = key[:_KEY]
    return key + hashlib.sha256(os.fsencode(f"{name}/{key}")).hexdigest()[:_CHECK]


def _siblings(target: Path, *kinds: str) -> Iterator[Path]:
    """The folders of runs that make a target, in order."""
    target = Path(os.path.realpath(target))
    begin = _shown(target.name)
    for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        found = _FORM.fullmatch(path.name.removeprefix(begin)) if path.name.startswith(begin) else None
        if (
            found
            and found[2] in kinds
            and _is_ours(path, found[1], target.name)
            and path.is_dir()
            and not path.is_symlink()
        ):
            yield path


def _is_ours(path: Path, token: str, name: str) -> bool:
    """Whether a sibling's token is one; those of earlier versions were the key alone, and what is finished there shows it."""
    if len(token) == _KEY and len(name) <= _ONCE_LONGEST and path.suffix == ".part":
        return (path / PROGRESS).is_file()
    return token == _token(name, token)


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
