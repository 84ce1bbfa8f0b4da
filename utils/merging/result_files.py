"""The files of a merged folder against what its manifest recorded of them: content, not names.

The manifest holds under `files` the SHA-256 of every file but itself, under `bytes` its size, under `modified_ns` when it
was written.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.publishing.siblings import PROGRESS

COMMAND = "utils/merger.py"  # what a manifest of ours says; other commands write manifests, too
_SMALL = 64 * 2**20  # bytes up to which a file is read even if its size and time are as recorded
_READERS = 4
_LONGEST_NAME = 255  # bytes


def read_result_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier merge in a folder, or None if there is none that is ours and readable."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        data = read_json(folder / MANIFEST, MANIFEST, finite=True)
    except UserError:
        return None
    ours = data.get("command") == COMMAND and isinstance(data.get("files"), dict)
    return data if ours else None


def file_record(folder: Path) -> dict[str, dict[str, Any]]:
    """`files`, `bytes` and `modified_ns` of every file below a folder but the manifest, by relative path."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in (MANIFEST, PROGRESS):
        paths.pop(name, None)
    with ThreadPoolExecutor(_READERS) as pool:  # hashing lets go of Python's lock
        hashes = list(pool.map(file_sha256, paths.values()))
    found = {name: path.stat() for name, path in paths.items()}
    return {
        "files": dict(zip(paths, hashes, strict=True)),
        "bytes": {name: one.st_size for name, one in found.items()},
        "modified_ns": {name: one.st_mtime_ns for name, one in found.items()},
    }


class Deviation(NamedTuple):
    """What about a file of a merged folder is not as recorded, as a clause that begins with its name."""

    text: str
    is_missing: bool = False


def deviations(folder: Path, manifest: Mapping[str, Any], *, every_byte: bool) -> list[Deviation]:
    """What in a merged folder is not as its manifest recorded it.

    Args:
        folder: the folder.
        manifest: its manifest.
        every_byte: read every file; else large ones only where their size or time of change is another one.
    """
    recorded = manifest["files"]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _deviation(folder, manifest, name, every_byte), recorded)
        return sorted([*filter(None, found), *_unrecorded(folder, recorded)])


def _deviation(folder: Path, manifest: Mapping[str, Any], name: str, every_byte: bool) -> Deviation | None:
    if not _is_inside(name):  # somebody has put it into the manifest: it leads to a file of theirs, or nowhere
        return Deviation(f"{name[:80]!r} in {MANIFEST} is not the name of a file in the folder")
    if not os.path.lexists(folder / name):
        return Deviation(f"{name} is missing", is_missing=True)
    text = _difference(folder / name, manifest, name, every_byte)
    return Deviation(text) if text else None


def _is_inside(name: str) -> bool:
    """Whether a recorded name is a plain path below the folder."""
    path = PurePosixPath(name)
    short = all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts)
    return name == str(path) != "." and not path.is_absolute() and ".." not in path.parts and "\0" not in name and short


def _difference(path: Path, manifest: Mapping[str, Any], name: str, every_byte: bool) -> str:
    digest = manifest["files"][name]
    if not path.is_file() or path.is_symlink():
        return f"{name} is not a regular file"
    found = path.stat()
    size, time = (_recorded(manifest, key, name) for key in ("bytes", "modified_ns"))
    if size is not None and found.st_size != size:
        return f"{name} has {found.st_size} bytes, recorded were {size}"
    if not every_byte and found.st_size > _SMALL and found.st_mtime_ns == time:
        return ""
    return "" if file_sha256(path) == digest else f"{name} has other content"


def _recorded(manifest: Mapping[str, Any], key: str, name: str) -> Any:
    table = manifest.get(key)
    return table.get(name) if isinstance(table, dict) else None


def _unrecorded(folder: Path, recorded: Mapping[str, Any]) -> Iterator[Deviation]:
    holding = {parent.as_posix() for name in recorded for parent in Path(name).parents}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if name not in (holding if is_folder else {*recorded, MANIFEST}):
            yield Deviation(f"{name} was not written by the merge")
