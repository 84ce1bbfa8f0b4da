"""The files of a merged folder against what its manifest recorded of them: content, not names.

The manifest holds under `files` the SHA-256 of every file but itself, under `bytes` its size, under `modified_ns` when it
was written.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.publishing.siblings import PROGRESS

COMMAND = "utils/merger.py"  # what a manifest of ours says; other commands write manifests, too
_SMALL = 64 * 2**20  # bytes up to which a file is read even if its size and time are as recorded
_READERS = 4


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


def deviations(folder: Path, manifest: Mapping[str, Any], *, every_byte: bool) -> list[str]:
    """What in a merged folder is not as its manifest recorded it, as clauses that begin with the file's name.

    Args:
        folder: the folder.
        manifest: its manifest.
        every_byte: read every file; else large ones only where their size or time of change is another one.
    """
    recorded = manifest["files"]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _deviation(folder, manifest, name, every_byte), recorded)
        return sorted([*filter(None, found), *_unrecorded(folder, recorded)])


def _deviation(folder: Path, manifest: Mapping[str, Any], name: str, every_byte: bool) -> str:
    path, digest = folder / name, manifest["files"][name]
    if not path.is_file() or path.is_symlink():
        return f"{name} is missing" if not path.exists() else f"{name} is no plain file"
    found = path.stat()
    if isinstance(digest, int):  # by an earlier version, which recorded sizes
        return "" if found.st_size == digest else f"{name} has another size"
    size, time = (_recorded(manifest, key, name) for key in ("bytes", "modified_ns"))
    if size is not None and found.st_size != size:
        return f"{name} has {found.st_size} bytes, recorded were {size}"
    if not every_byte and found.st_size > _SMALL and found.st_mtime_ns == time:
        return ""
    return "" if file_sha256(path) == digest else f"{name} has other content"


def _recorded(manifest: Mapping[str, Any], key: str, name: str) -> Any:
    table = manifest.get(key)
    return table.get(name) if isinstance(table, dict) else None


def _unrecorded(folder: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    holding = {parent.as_posix() for name in recorded for parent in Path(name).parents}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if name not in (holding if is_folder else {*recorded, MANIFEST}):
            yield f"{name} is not of the merge"
