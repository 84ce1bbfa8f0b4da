"""The folder that results go to: whether it can be made, what lies there, and who else writes there."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.named_paths import check_path
from utils.publishing.disk import remove_empty
from utils.publishing.manifest import MANIFEST

_MOMENT = 0.1  # seconds
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MOUNTS = Path("/proc/self/mountinfo")


def prepare_folder(folder: Path, flag: str) -> None:
    """Check that `folder` can be meant, and exists as a writable folder or can be made; nothing is created.

    Raises:
        UserError: its name begins or ends with white space or holds control characters; it is the root of all folders; it
            cannot be named in UTF-8; as `check_writable`.
    """
    if folder.name != folder.name.strip() or _CONTROL.search(str(folder)):
        raise UserError(
            f"{flag} {str(folder)!r}: a name that begins or ends with white space or holds control characters is refused: "
            "an error in quoting?",
            "out-name",
        )
    whole = Path(os.path.realpath(folder))
    if whole == whole.parent:
        raise UserError(f"{flag} {folder} is the root of all folders; give a folder of its own", "out-root")
    check_path(whole, flag)
    check_writable(folder, flag)


def check_writable(folder: Path, flag: str) -> None:
    """Check that `folder` exists as a writable folder or can be made; nothing is created.

    Raises:
        UserError: it, or one of its parents, is a file, or is not writable.
    """
    try:
        nearest = folder
        while not nearest.exists():
            if nearest.is_symlink():
                raise UserError(f"{flag} {folder}: {nearest} is a broken symbolic link", "out-broken-link")
            nearest = nearest.parent
        if not nearest.is_dir():
            raise UserError(f"{flag} {folder}: {nearest} is a file, not a folder", "out-is-file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {folder}: {nearest} is not writable", "out-unwritable")
        limit = os.pathconf(nearest, "PC_NAME_MAX")
        for part in folder.parts:
            if len(os.fsencode(part)) > limit:
                raise UserError(f"{flag}: the name {part[:40]!r}... is longer than {limit} bytes", "out-name-too-long")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {str(folder)[:200]!r} cannot be used: {why}", "out-unusable") from error


def refuse_existing(folder: Path, names: Mapping[str, Any] | list[str], *, overwrite: bool = False) -> None:
    """Raise a `UserError` if `folder` already holds a file of one of these names that must not be replaced.

    Something that is not a file (a folder of that name) is never replaced; a file only with `overwrite`.
    """
    present = [name for name in names if os.path.lexists(folder / name)]
    for name in present:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is in the way and is not a file: move it, or choose another folder", "out-in-the-way"
            )
    if present and not overwrite:
        raise UserError(
            f"{folder} already holds {', '.join(present)}: give --overwrite to replace, or another folder", "out-exists"
        )


def refuse_mount_point(folder: Path, flag: str) -> None:
    """Raise a `UserError` if another file system begins at a folder that is to be replaced: nothing can be renamed there."""
    if os.path.ismount(folder) or str(folder) in _mount_points():
        raise UserError(
            f"{flag} {folder} is a mount point, which no finished folder can be renamed to; give a folder inside it",
            "out-is-mount",
        )


def _mount_points() -> set[str]:
    """Where file systems and parts of them (`mount --bind`) are mounted, as far as this system lists them (Linux)."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    octal = re.compile(r"\\([0-7]{3})")  # white space and backslashes
    return {octal.sub(lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines}


def refuse_others_manifest(folder: Path, is_ours: Callable[[Mapping[str, Any]], bool]) -> None:
    """Raise a `UserError` if `folder` has a manifest that another command or another project wrote: without it, whoever wrote
    it does not know its own files any more. One that cannot be read is not looked at.
    """
    path = folder / MANIFEST
    try:
        data = read_json(path, MANIFEST) if path.is_file() else None
    except UserError:
        return
    if data is not None and not is_ours(data):
        raise UserError(f"{path} is of another command, or of nobody here: choose another folder", "out-not-ours")


@contextlib.contextmanager
def locked_folder(
    folder: Path, *, is_same: Callable[[], bool] = lambda: False, say: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Make `folder` if needed and hold it against a second run of this project; no lock file is left behind.

    Args:
        folder: the folder.
        is_same: whether the run that holds it does the very same, and is waited for.
        say: takes a line then.

    Raises:
        UserError: another run is writing there.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with contextlib.ExitStack() as stack:
        try:
            descriptor = _opened(folder)
            stack.callback(lambda: os.close(descriptor))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                made = []  # whoever holds the lock uses them
                if not _becomes(is_same):
                    raise UserError(
                        f"{folder} is being written by another run; wait for it or choose another folder", "out-in-use"
                    ) from error
                say(f"another run fills {folder} in the same way; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                while not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
                    os.close(descriptor)  # that run has failed, and taken its folder away
                    descriptor = _opened(folder)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        except BaseException:
            remove_empty(made)
            raise


def _opened(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_RDONLY)


def _becomes(is_same: Callable[[], bool]) -> bool:
    """Whether a run that has just begun shows within a moment that it does the same."""
    for _ in range(20):
        if is_same():
            return True
        time.sleep(_MOMENT)
    return False
