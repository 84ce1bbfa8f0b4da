"""All-or-nothing output beside other files: temporary names, then renames; nothing overwritten unasked.

Commands 1 and 2 put a few files beside others in a folder; command 3 makes a folder of its own (`utils/staging.py`).
Temporary names lie in the same folder, so that a rename never crosses a file system. Before the first rename a journal of
all of them reaches the disk: if the run is killed between two, `repair_folder` goes on where it stopped.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.signals import finish, signals_held

MANIFEST = "manifest.json"
_CHUNK = 8 * 2**20
_MOMENT = 0.1  # seconds
_STAGE_PREFIX, _STAGE_SUFFIX = ".publish.", ".part"
_JOURNAL = ".journal.json"  # in a stage that is complete: what lay under each name before, in the order of the renames
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def to_json(data: Mapping[str, Any]) -> bytes:
    """Serialize a manifest: stable order, two-space indent, trailing newline; NaN and infinity are refused."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def prepare_folder(folder: Path, flag: str) -> None:
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


def publish_files(folder: Path, files: Mapping[str, bytes | Path], *, overwrite: bool, last: bool = False) -> None:
    """Write `files` (name to content) into `folder`, the last one of the mapping last.

    Content that is too large for memory is given as the path of a finished file on the same file system, which is moved.

    All content reaches the disk in a temporary folder before the first rename; a failure leaves the folder as it was,
    also one between renames. A kill between renames leaves what `repair_folder` completes. Signals wait until the renames
    are done. Files already there are replaced only with `overwrite`; `last` says that the command has succeeded with this.

    Raises:
        UserError: a file of that name exists and `overwrite` is false; all is in its place, but the system could not say
            that it reached the disk.
        OSError: the disk is full, and so on.
    """
    refuse_existing(folder, files, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it while the work was done
    stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, suffix=_STAGE_SUFFIX, dir=folder))
    try:
        for name, content in files.items():
            if isinstance(content, Path):
                os.replace(content, stage / name)
            _write_through(stage / name, content if isinstance(content, bytes) else None)
        _write_through(stage / _JOURNAL, to_json({name: _stamp(folder / name) for name in files}))
        sync_folder(stage)
        with signals_held():
            _move_files(stage, folder, list(files))
            if last:
                finish()
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    sync_published(folder)


def repair_folder(folder: Path) -> str:
    """Complete what a killed run has left half published in a folder, and remove what it has left unpublished.

    Nothing is done while another run works in the folder. Files that somebody changed since the kill stay as they are.

    Returns:
        A sentence about what was done, "" if there was nothing to do.
    """
    stages = _stages(folder)
    if not stages:
        return ""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        completed = [name for stage in stages for name in _completed(stage, folder)]
    except BlockingIOError:
        return ""
    finally:
        os.close(descriptor)
    if completed:
        return f"a run was killed while it published into {folder}: {', '.join(completed)} went to its place"
    return f"removed what a killed run has left in {folder}"


def half_published(folder: Path) -> bool:
    """Whether a run was killed in a folder between the renames, so that files of two results may lie side by side."""
    return any((stage / _JOURNAL).is_file() for stage in _stages(folder))


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


def _move_files(stage: Path, folder: Path, names: list[str]) -> None:
    """Rename files from `stage` into `folder`; on an error, put back what was there."""
    placed: list[tuple[Path, Path]] = []
    try:
        for name in names:
            final, old = folder / name, stage / f"{name}.old"
            if final.exists():
                _keep(final, old)
            placed.append((final, old))
            os.replace(stage / name, final)
    except BaseException:
        for final, old in reversed(placed):
            with contextlib.suppress(OSError):
                if old.exists():
                    os.replace(old, final)
                elif not (stage / final.name).exists():
                    final.unlink()
        raise


def _keep(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(file, copy)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where its file system can say so; the files are complete either way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_published(folder: Path) -> None:
    """`sync_folder` for a folder whose new content is in its place.

    Raises:
        UserError: the system could not say that the names reached the disk.
    """
    try:
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the result is complete and in its place, but the system could not confirm that it reached the "
            f"disk ({error.strerror}); check the disk before you rely on it",
            "out-not-synced",
        ) from error


def _write_through(path: Path, content: bytes | None) -> None:
    """Write a file, or take it as it is, and have it reach the disk."""
    with open(path, "r+b" if content is None else "wb") as file:
        if content is not None:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _stages(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob(f"{_STAGE_PREFIX}*{_STAGE_SUFFIX}") if path.is_dir())


def _completed(stage: Path, folder: Path) -> list[str]:
    """Carry out the renames that a journal still asks for, remove the stage, and return the names."""
    moved = []
    try:
        journal = read_json(stage / _JOURNAL, _JOURNAL)
    except UserError:
        journal = {}  # killed before all content was there: nothing was renamed
    for name, before in journal.items():
        if (stage / name).is_file() and Path(name).name == name and _stamp(folder / name) == before:
            os.replace(stage / name, folder / name)
            moved.append(name)
    sync_folder(folder)
    shutil.rmtree(stage, ignore_errors=True)
    return moved


def _stamp(path: Path) -> list[int] | None:
    """What tells a file from another of the same name; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for a run that published nothing, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
