"""Where a merged model may be written: never over an input, never over files that an earlier merge did not write."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError
from utils.merging.result_files import Deviation, deviations, read_result_manifest
from utils.publishing.disk import free_bytes
from utils.publishing.manifest import MANIFEST
from utils.publishing.siblings import dead_bytes
from utils.publishing.staging import Stamp, stamp
from utils.publishing.target import check_writable, prepare_folder, refuse_mount_point
from utils.runtime import gigabytes

FLAG = "--output_path"


@dataclass(frozen=True)
class OutputFolder:
    """The folder to publish, absolute and free of links.

    `replaceable` are the files of an earlier merge that may go, with their stamps. `request` is what the earlier merge was
    asked for, "" if there is none: without --overwrite its folder is only good for the very same request.
    """

    target: Path
    replaceable: Mapping[str, Stamp] = field(default_factory=dict)
    request: str = ""


def check_output(path: Path, *, overwrite: bool, recipe: str = "") -> OutputFolder:
    """Check an output folder without knowing the inputs; nothing is created.

    Args:
        path: as the user gave it.
        overwrite: whether the files of an earlier merge may be replaced.
        recipe: SHA-256 of the recipe. An earlier merge by the same may be what is asked for again.

    Raises:
        UserError: it is a file, the current folder or one above it, not writable, or holds files: any without
            `overwrite` but a merge by the same recipe, foreign or edited ones with it.
    """
    target = check_place(path)
    return _earlier(path, target, overwrite, recipe)


def check_place(path: Path) -> Path:
    """The absolute path of an output folder, free of links, where one can be made there, whatever lies there.

    Raises:
        UserError: it is a file, the current folder or one above it, a mount point, or not writable.
    """
    prepare_folder(path, FLAG)
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{FLAG} {str(path)!r} cannot be used: {error}", "out-unusable") from error
    here = Path.cwd()
    if target == here or target in here.parents:
        raise UserError(f"{FLAG} {path} is the current folder or one above it; give a folder of its own", "out-current")
    if target.exists():
        refuse_mount_point(target, FLAG)
        check_writable(target.parent, FLAG)  # the result is made beside it and renamed
    return target


def existing_merge(path: Path) -> UserError:
    """The error that refuses an output folder with another merge in it."""
    return UserError(
        f"{FLAG} {path} holds the result of an earlier merge; give --overwrite to replace it", "out-exists"
    )


def refuse_changed_merge(path: Path) -> None:
    """Raise a `UserError` if the merge in a folder is not as its manifest recorded it; of large files sizes and times tell."""
    manifest = read_result_manifest(path)
    changed = deviations(path, manifest, every_byte=False) if manifest else []
    if not changed:
        return
    missing = all(one.is_missing for one in changed)
    first = "" if missing else "move away, or remove, the files that were changed or added, and "
    raise UserError(
        f"{FLAG} {path} held exactly this merge, but was changed since: {_listed(changed)}. To have it made again {first}give "
        "--overwrite; or give another folder",
        "out-changed",
    )


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

    What runs that were stopped have left beside it counts as free: the same run goes on with it, another removes it.

    Returns:
        Bytes free.

    Raises:
        UserError: there is not enough.
    """
    free, folder = free_bytes(output.target.parent)
    free += dead_bytes(output.target)
    if free < needed:
        raise UserError(
            f"{FLAG} {output.target}: the result needs {gigabytes(needed)}, {folder} has {gigabytes(free)} free; make "
            "room or choose another disk",
            "disk-full",
        )
    return free


def _listed(changed: Sequence[Deviation]) -> str:
    return "; ".join(one.text for one in changed[:5]) + (" ..." if len(changed) > 5 else "")


def _earlier(path: Path, target: Path, overwrite: bool, recipe: str) -> OutputFolder:
    if not target.exists() or not any(target.iterdir()):
        return OutputFolder(target)
    manifest = read_result_manifest(target)
    if manifest is None:
        raise UserError(
            f"{FLAG} {path} holds files and no manifest of an earlier merge, so nothing there is touched; give an "
            "empty or new folder",
            "out-not-ours",
        )
    if not overwrite:
        merged, request = manifest.get("recipe"), manifest.get("request")
        if not recipe or not isinstance(merged, dict) or merged.get("sha256") != recipe or not isinstance(request, str):
            raise existing_merge(path)
        return OutputFolder(target, request=request)
    if changed := [one for one in deviations(target, manifest, every_byte=False) if not one.is_missing]:
        raise UserError(
            f"{FLAG} {path}: {_listed(changed)}. Nothing there is touched; move that away, or remove it if it is of no use, or "
            "give another folder",
            "out-foreign-files",
        )
    names = [name for name in (*manifest["files"], MANIFEST) if (target / name).is_file()]
    return OutputFolder(target, {name: stamp(target / name) for name in sorted(names)})
