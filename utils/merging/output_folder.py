"""Where a merged model may be written: never over an input, never over files that an earlier merge did not write."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.publish import MANIFEST, foreign_files, prepare_folder, refuse_parallel_run
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
        raise UserError(f"{FLAG} {str(path)!r} begins or ends with white space: an error in quoting?", "out-name")
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{FLAG} {str(path)!r} cannot be used: {error}", "out-unusable") from error
    here = Path.cwd()
    if target == here or target in here.parents:
        raise UserError(f"{FLAG} {path} is the current folder or one above it; give a folder of its own", "out-current")
    prepare_folder(target, FLAG)
    if target.exists():
        prepare_folder(target.parent, FLAG)  # the result is made beside it and renamed
    refuse_parallel_run(target)
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
            raise UserError(f"{FLAG} {path} is the model {name} itself; give another folder", "out-is-input")
        if target in resolved.parents:
            raise UserError(f"{FLAG} {path} holds the model {name}; give a folder beside it", "out-holds-input")
        if resolved in target.parents:
            raise UserError(f"{FLAG} {path} lies inside the model {name}; give a folder beside it", "out-in-input")


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
            "room or choose another disk",
            "disk-full",
        )
    return free


def _replaceable(path: Path, target: Path, overwrite: bool) -> tuple[str, ...]:
    if not target.exists() or not any(target.iterdir()):
        return ()
    manifest = _manifest(target)
    if manifest is None:
        raise UserError(
            f"{FLAG} {path} holds files and no manifest of an earlier merge, so nothing there is touched; give an "
            "empty or new folder",
            "out-not-ours",
        )
    if not overwrite:
        raise UserError(
            f"{FLAG} {path} holds the result of an earlier merge; give --overwrite to replace it", "out-exists"
        )
    known = {*manifest["files"], MANIFEST}
    foreign = foreign_files(target, known)
    if foreign:
        files = f"{', '.join(foreign[:5])} {'is' if len(foreign) == 1 else 'are'}"
        raise UserError(
            f"{FLAG} {path}: {files} not of the earlier merge, so nothing there is touched; move what is yours away, "
            "or give another folder",
            "out-foreign-files",
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
