"""A folder made beside its place and published in one step; what killed runs have left is taken up or swept.

While a run works, a hidden folder beside the target is its own (`utils/publishing/siblings.py`): a lock on it ends with the
process, even by a kill. Its key says what is being made. A run that makes the same takes a dead run's folder over, with what
is finished in it, or waits for the living one; a run that makes something else is refused while one lives and sweeps what is
dead.

A target that exists changes places with the new folder in one step where the system can do that (`utils/publishing/exchange.py`).
Elsewhere it is first moved to a hidden name, so that there is a moment without a target: the next run puts it back.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from utils.errors import UserError
from utils.publishing.disk import remove_empty, remove_tree, sync_folder, sync_published, write_through
from utils.publishing.exchange import exchange
from utils.publishing.kept import note_kept
from utils.publishing.siblings import PROGRESS, refuse_parallel_run, stage_of
from utils.signals import finish, signals_held

Stamp = tuple[int, int]  # bytes and time of change in nanoseconds


def stamp(path: Path) -> Stamp:
    """What tells that a file has not been written since."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def staged_folder(
    target: Path,
    *,
    replaceable: Mapping[str, Stamp] | None = None,
    key: str | None = None,
    is_there: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    last: bool = False,
    is_of_use: Callable[[BaseException], bool] = lambda error: True,
) -> Iterator[Path | None]:
    """Yield a sibling of `target`; when the block ends well, it becomes `target`.

    Every file reaches the disk before that, with the permissions that new files have (safetensors are written for their
    owner alone). What stops the block removes what was written, and the parent folders that were made for it; but a folder
    that holds `PROGRESS` stays, and the exception carries it (`utils/publishing/kept.py`), as long as it `is_of_use`.

    Args:
        target: the folder to publish. It may exist if it is empty, or if it holds nothing but `replaceable`.
        replaceable: relative paths of files that may be removed, with their stamps.
        key: names what is made, in hexadecimal. The folder may then hold what a killed run of the same key finished;
            None: it is always empty.
        is_there: whether `target` holds by now what the key names, asked once this run has the folder to itself.
        say: takes a line where another run of the same key is waited for.
        last: whether the command has succeeded with this.
        is_of_use: whether the same run could still go on with what is finished, asked with what has stopped it.

    Yields:
        The folder; None if `is_there`, and nothing is published then.

    Raises:
        UserError: another run is at it with another key, or `target` holds something that is not `replaceable` by the
            time it would be replaced.
    """
    with working_folder(target, key=key, is_there=is_there, say=say, is_of_use=is_of_use) as stage:
        yield stage
        if stage is None:
            return
        _settle(stage)
        with signals_held():
            with _without_progress(stage):
                _swap_in(stage, target, replaceable or {})
            if last:
                finish()
        sync_published(target.parent)


@contextlib.contextmanager
def working_folder(
    target: Path,
    *,
    key: str | None = None,
    is_there: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    is_of_use: Callable[[BaseException], bool] = lambda error: True,
) -> Iterator[Path | None]:
    """The folder of `staged_folder` alone: it is removed in the end, unless it was moved or what stopped it left `PROGRESS`."""
    target = Path(os.path.realpath(target))  # a link to a folder stays, the folder it names is replaced
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(target, key or secrets.token_hex(6), say) as stage:
            if is_there():
                remove_tree(stage)
                yield None
                return
            if not (stage / PROGRESS).is_file():
                _empty(stage)
            try:
                yield stage
            except BaseException as error:
                if (stage / PROGRESS).is_file() and is_of_use(error):
                    note_kept(error, stage)
                else:
                    remove_tree(stage)
                raise
            remove_tree(stage)
    except BaseException:
        remove_empty(made)
        raise


def foreign_entries(folder: Path, known: Mapping[str, Stamp]) -> list[str]:
    """Relative paths below a folder that are not in `known`, were written since, or are folders that hold nothing known."""
    if not folder.exists():
        return []
    holding = {parent.as_posix() for name in known for parent in Path(name).parents}
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            foreign = name not in holding
        else:
            foreign = path.is_symlink() or name not in known or stamp(path) != known[name]
        if foreign:
            found.append(name)
    return sorted(found)


@contextlib.contextmanager
def _claimed(target: Path, key: str, say: Callable[[str], None]) -> Iterator[Path]:
    """This run's own folder for a key, locked; waits for another run that has it."""
    stage = stage_of(target, key)
    waiting = False
    while True:
        with contextlib.suppress(FileExistsError):  # not `exist_ok`, which looks again, when it may have been published
            stage.mkdir()
        try:
            descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # published or swept in this moment
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            text = f"{stage} is in the way: it is a file or a link, where {target} is to be made. Move it"
            raise UserError(text, "out-in-the-way") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    say(f"another run is making {target} in the same way; waiting for it")
                waiting = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, stage):
                continue
            try:
                refuse_parallel_run(target, key)
            except UserError:
                with contextlib.suppress(OSError):
                    stage.rmdir()
                raise
            yield stage
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open folder: whoever held it may have published or swept it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _without_progress(stage: Path) -> Iterator[None]:
    """Nobody shall find `PROGRESS` in what is published; where nothing comes to be, it is there again."""
    path = stage / PROGRESS
    progress = path.read_bytes() if path.is_file() else None
    path.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if progress is not None and stage.is_dir():
            with contextlib.suppress(OSError):  # the disk is full: what was made is removed then
                write_through(path, progress)
        raise


def _swap_in(stage: Path, target: Path, replaceable: Mapping[str, Stamp]) -> None:
    target = Path(os.path.realpath(target))
    if not target.exists():
        os.rename(stage, target)
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; choose another folder", "out-is-file")
    _refuse_foreign(target, target, replaceable)
    retired = stage.with_suffix(".old")
    remove_tree(retired)  # a dead run's, whose target is back
    if exchange(stage, target):
        try:
            os.rename(stage, retired)  # what was the target, under a name that nobody takes for unfinished work
        except OSError:  # it is in its place all the same
            retired = stage
        try:
            _refuse_foreign(retired, target, replaceable)  # what appeared in the last moment
        except UserError:
            exchange(retired, target)
            if retired != stage:
                os.rename(retired, stage)  # what was made is as good as before
            raise
    else:
        os.rename(target, retired)
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(retired, target)
            raise
    remove_tree(retired)


def _refuse_foreign(folder: Path, target: Path, replaceable: Mapping[str, Stamp]) -> None:
    if foreign := foreign_entries(folder, replaceable):
        raise UserError(
            f"{target} holds files this project did not write: {', '.join(foreign[:5])}. Move them first",
            "out-foreign-files",
        )


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


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
