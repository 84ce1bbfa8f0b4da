"""All-or-nothing output: temporary names, then renames; nothing overwritten unasked.

Two shapes of output exist. Commands 1 and 2 put a few files beside others in a folder (`publish_files`); command 3
makes a folder of its own (`staged_folder`). Temporary names are siblings of the final ones, so that a rename never
crosses a file system.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

MANIFEST = "manifest.json"
_CHUNK = 8 * 2**20
_STAGE_SUFFIX = ".part"
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
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if needed and hold it against a second run of this project; no lock file is left behind.

    Raises:
        UserError: another run is writing there.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                made = []  # whoever holds the lock uses them
                raise UserError(
                    f"{folder} is being written by another run; wait for it or choose another folder", "out-in-use"
                ) from error
            yield
        except BaseException:
            _remove_empty(made)
            raise


def publish_files(folder: Path, files: Mapping[str, bytes | Path], *, overwrite: bool) -> None:
    """Write `files` (name to content) into `folder`, the last one of the mapping last.

    Content that is too large for memory is given as the path of a finished file on the same file system, which is moved.

    All content reaches the disk in a temporary folder before the first rename; a failure leaves the folder as it was,
    also one between renames. (A kill between renames leaves some of the files, but never the last one alone.) Signals
    wait until the renames are done. Files already there are replaced only with `overwrite`.

    Raises:
        UserError: a file of that name exists and `overwrite` is false.
        OSError: the disk is full, and so on.
    """
    refuse_existing(folder, files, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it while the work was done
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder, ignore_cleanup_errors=True) as stage:
        for name, content in files.items():
            if isinstance(content, Path):
                os.replace(content, Path(stage, name))
            with open(Path(stage, name), "r+b" if isinstance(content, Path) else "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
        with _signals_held():
            _move_files(Path(stage), folder, list(files))
        sync_folder(folder)


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


@contextlib.contextmanager
def staged_folder(target: Path, *, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary sibling of `target`; when the block ends well, it becomes `target`.

    Every file reaches the disk before the rename, with the permissions that new files have (safetensors are written for
    their owner alone). Two runs cannot make the same folder at once. A failure removes what was written, and the parent
    folders that were made for it.

    Args:
        target: the folder to publish. It may exist if it is empty, or if it holds nothing but `replaceable`.
        replaceable: relative paths of files, listed by an earlier run's manifest, that may be removed.

    Raises:
        UserError: another run is at it, or `target` holds a file that is not `replaceable` by the time of the rename.
    """
    target = Path(os.path.realpath(target))  # a link to a folder stays, the folder it names is replaced
    refuse_parallel_run(target)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=_stage_prefix(target), suffix=_STAGE_SUFFIX, dir=target.parent))
        try:
            with _held(stage):
                yield stage
                _settle(stage)
                with _signals_held():
                    _swap_in(stage, target, set(replaceable))
            sync_folder(target.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        _remove_empty(made)
        raise


def refuse_parallel_run(target: Path) -> None:
    """Raise a `UserError` if another run is making this folder."""
    if any(_is_held(folder) for folder in _stages(target)):
        raise UserError(f"{target} is being written by another run; wait for it or choose another folder", "out-in-use")


def left_over(target: Path) -> list[Path]:
    """Hidden folders beside a target that a killed run has left; nobody works in them any more."""
    return [folder for folder in _stages(target) if not _is_held(folder)]


def foreign_files(folder: Path, known: set[str]) -> list[str]:
    """Relative paths of the files in `folder` that are not in `known`; empty if the folder does not exist."""
    if not folder.exists():
        return []
    found = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    )
    return sorted(name for name in found if name not in known)


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


def _swap_in(stage: Path, target: Path, replaceable: set[str]) -> None:
    if not target.exists():
        os.rename(stage, target)
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; choose another folder", "out-is-file")
    foreign = foreign_files(target, replaceable)
    if foreign:
        raise UserError(
            f"{target} holds files this project did not write: {', '.join(foreign[:5])}. Move them first",
            "out-foreign-files",
        )
    retired = Path(tempfile.mkdtemp(prefix=_stage_prefix(target), suffix=".old", dir=target.parent))
    try:
        os.rename(target, retired / "old")
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(retired / "old", target)
            raise
    finally:
        if target.exists():  # else the old folder is all there is: keep it
            shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let Ctrl-C, termination and hang-up wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # signals never interrupt other threads
        yield
        return
    held: list[int] = []
    previous = {
        signum: signal.signal(signum, lambda number, frame: held.append(number))
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(signal.getsignal(signum))
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if held:
        raise KeyboardInterrupt


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


def _settle(folder: Path) -> None:
    """Have everything in a folder reach the disk, with the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.chmod(path, 0o666 & ~mask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.chmod(folder, 0o777 & ~mask)
    sync_folder(folder)


def _stage_prefix(target: Path) -> str:
    return f".{target.name[:64]}."


def _stages(target: Path) -> list[Path]:
    if not target.parent.is_dir():
        return []
    form = re.compile(re.escape(_stage_prefix(target)) + r"[a-z0-9_]{8}" + re.escape(_STAGE_SUFFIX))  # tempfile's names
    return [path for path in target.parent.iterdir() if form.fullmatch(path.name) and path.is_dir()]


@contextlib.contextmanager
def _held(stage: Path) -> Iterator[None]:
    """Lock a folder as long as this process works in it; the lock ends with the process, even by a kill."""
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_held(stage: Path) -> bool:
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for a run that published nothing, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
