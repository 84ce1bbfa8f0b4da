"""Where a merged model may be written: never over an input, never over files that an earlier merge did not write."""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.publish import MANIFEST, foreign_files, prepare_folder, staged_folder
from utils.runtime import gigabytes

FLAG = "--output_path"
COMMAND = "utils/merger.py"  # what a manifest of ours says; other commands write manifests, too


@dataclass(frozen=True)
class OutputFolder:
    """The folder to publish, absolute and free of links, and the files of an earlier merge that may go."""

    target: Path
    replaceable: tuple[str, ...] = ()


def check_output(path: Path, *, overwrite: bool) -> OutputFolder:
    """Check an output folder without knowing the inputs; nothing is created.

    Args:
        path: as the user gave it.
        overwrite: whether the files of an earlier merge may be replaced.

    Raises:
        UserError: it is a file, the current folder or one above it, not writable, or holds files: any without
            `overwrite`, foreign ones with it.
    """
    if path.name != path.name.strip():
        raise UserError(f"{FLAG} {str(path)!r} begins or ends with white space: a slip in quoting?")
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{FLAG} {str(path)!r} cannot be used: {error}") from None
    here = Path.cwd()
    if target == here or target in here.parents:
        raise UserError(f"{FLAG} {path} is the current folder or one above it; give a folder of its own")
    prepare_folder(target, FLAG)
    if target.exists():
        prepare_folder(target.parent, FLAG)  # the result is made beside it and renamed
    _refuse_parallel_run(target)
    return OutputFolder(target, _replaceable(path, target, overwrite))


def check_apart(path: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Check that the output folder is no input, holds none and lies in none.

    Args:
        path: the output folder as the user gave it.
        inputs: name and folder of every input.

    Raises:
        UserError: as above.
    """
    target = Path(os.path.realpath(path))
    for name, folder in inputs:
        resolved = Path(os.path.realpath(folder))
        if target == resolved:
            raise UserError(f"{FLAG} {path} is the model {name} itself; give another folder")
        if target in resolved.parents:
            raise UserError(f"{FLAG} {path} holds the model {name}; give a folder beside it")
        if resolved in target.parents:
            raise UserError(f"{FLAG} {path} lies inside the model {name}; give a folder beside it")


def check_space(output: OutputFolder, needed: int) -> int:
    """Compare the free space of the output's file system with what the result needs.

    Returns:
        Bytes free.

    Raises:
        UserError: there is not enough.
    """
    folder = output.target.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{FLAG} {output.target}: the result needs {gigabytes(needed)}, {folder} has {gigabytes(free)} free; make "
            "room or choose another disk"
        )
    return free


@contextlib.contextmanager
def open_stage(output: OutputFolder) -> Iterator[Path]:
    """Yield an empty folder beside the output; when the block ends well, it becomes the output.

    Two runs cannot make the same output at once. A failure removes what was written, and the parent folders that were
    made for it. Every file reaches the disk before the rename, with the permissions that new files have (safetensors
    are written for their owner alone).

    Raises:
        UserError: another run is at it, or foreign files have appeared in the output folder meanwhile.
    """
    _refuse_parallel_run(output.target)
    made = [parent for parent in output.target.parents if not parent.exists()]
    try:
        with staged_folder(output.target, replaceable=list(output.replaceable)) as stage, _held(stage):
            yield stage
            _settle(stage)
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def left_over(output: OutputFolder) -> list[Path]:
    """Hidden folders beside the output that a killed run has left; nobody works in them any more."""
    return [folder for folder in _stages(output.target) if not _is_held(folder)]


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


def _stages(target: Path) -> list[Path]:
    if not target.parent.is_dir():
        return []
    form = re.compile(re.escape(f".{target.name[:64]}.") + r"[a-z0-9_]{8}\.part")  # as tempfile names them
    return [path for path in target.parent.iterdir() if form.fullmatch(path.name) and path.is_dir()]


def _refuse_parallel_run(target: Path) -> None:
    if any(_is_held(folder) for folder in _stages(target)):
        raise UserError(f"{target} is being written by another run; wait for it or choose another folder")


def _settle(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.chmod(path, 0o666 & ~mask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _replaceable(path: Path, target: Path, overwrite: bool) -> tuple[str, ...]:
    if not target.exists() or not any(target.iterdir()):
        return ()
    manifest = _manifest(target)
    if manifest is None:
        raise UserError(
            f"{FLAG} {path} holds files and no manifest of an earlier merge, so nothing there is touched; give an "
            "empty or new folder"
        )
    if not overwrite:
        raise UserError(f"{FLAG} {path} holds the result of an earlier merge; give --overwrite to replace it")
    known = {*manifest["files"], MANIFEST}
    foreign = foreign_files(target, known)
    if foreign:
        files = f"{', '.join(foreign[:5])} {'is' if len(foreign) == 1 else 'are'}"
        raise UserError(
            f"{FLAG} {path}: {files} not of the earlier merge, so nothing there is touched; move what is yours away, "
            "or give another folder"
        )
    return tuple(sorted(known))


def _manifest(target: Path) -> dict[str, Any] | None:
    """The manifest of an earlier merge in a folder, or None if there is none that is ours and readable."""
    try:
        data = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(data, dict) and data.get("command") == COMMAND and isinstance(data.get("files"), dict)
    return data if ours else None
