"""All-or-nothing output beside other files: temporary names, then renames; nothing overwritten unasked.

Commands 1 and 2 put a few files beside others in a folder; command 3 makes a folder of its own (`utils/publishing/staging.py`).
Temporary names lie in the same folder, so that a rename never crosses a file system. Before the first rename a journal of
all of them reaches the disk: if the run is killed between two, `repair_folder` goes on where it stopped.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.publishing.disk import remove_tree, sync_folder, sync_published, write_through
from utils.publishing.manifest import to_json
from utils.publishing.target import refuse_existing
from utils.signals import finish, signals_held

_STAGE_PREFIX, _STAGE_SUFFIX = ".publish.", ".part"
_JOURNAL = ".journal.json"  # in a stage that is complete: what lay under each name before, in the order of the renames


def publish_files(folder: Path, files: Mapping[str, bytes | Path], *, overwrite: bool, last: bool = False) -> None:
    """Write `files` (name to content) into `folder`, the last one of the mapping last.

    Content that is too large for memory is given as the path of a finished file on the same file system, which gets a
    second name, or where there are no hard links is moved; after a failure it is where it was.

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
                _link_or_move(content, stage / name)
            write_through(stage / name, content if isinstance(content, bytes) else None)
        write_through(stage / _JOURNAL, to_json({name: _stamp(folder / name) for name in files}))
        sync_folder(stage)
        with signals_held():
            _move_files(stage, folder, list(files))
            if last:
                finish()
    except BaseException:
        for name, content in files.items():
            if isinstance(content, Path) and not content.exists() and (stage / name).exists():
                os.replace(stage / name, content)
        raise
    finally:
        remove_tree(stage)
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


def _link_or_move(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except OSError:  # a file system without hard links
        os.replace(file, other)


def _stages(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = folder.glob(f"{_STAGE_PREFIX}*{_STAGE_SUFFIX}")
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())  # a link leads to what is not ours


def _completed(stage: Path, folder: Path) -> list[str]:
    """Carry out the renames that a journal still asks for, remove the stage, and return the names."""
    moved = []
    try:
        journal = read_json(stage / _JOURNAL, _JOURNAL)
    except UserError:
        journal = {}  # killed before all content was there: nothing was renamed
    staged = {path.name for path in stage.iterdir() if path.is_file() and not path.is_symlink()}
    for name, before in journal.items():  # which may have come with the folder, from somebody else
        if name in staged and not (folder / name).is_dir() and _stamp(folder / name) == before:
            os.replace(stage / name, folder / name)
            moved.append(name)
    sync_folder(folder)
    remove_tree(stage)
    return moved


def _stamp(path: Path) -> list[int] | None:
    """What tells a file from another of the same name; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]
