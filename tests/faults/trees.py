"""A folder and all below it, taken into memory and put back: what a kill would leave, without killing anything."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

JOURNAL = ".journal.json"  # of `utils/publishing/files.py`: names with size, time of change and inode


@dataclass(frozen=True)
class Entry:
    """`content`: a file's bytes, or where a link leads to. `number`: the inode, equal for hard links."""

    kind: Literal["folder", "file", "link"]
    mode: int
    changed: int  # in nanoseconds
    number: int
    content: bytes = b""


Tree = dict[str, Entry]  # by relative path, parents first


def look(folder: Path) -> Tree:
    """What is below a folder."""
    return {path.relative_to(folder).as_posix(): _entry(path) for path in sorted(folder.rglob("*"))}


def _entry(path: Path) -> Entry:
    found = path.lstat()
    known = (found.st_mode & 0o7777, found.st_mtime_ns, found.st_ino)
    if path.is_symlink():
        return Entry("link", *known, os.fsencode(os.readlink(path)))
    return Entry("folder", *known) if path.is_dir() else Entry("file", *known, path.read_bytes())


def digest(tree: Tree) -> str:
    """Equal for trees of the same names, kinds, modes and bytes, whose files are of the same times."""
    total = hashlib.sha256()
    for name, entry in tree.items():
        changed = entry.changed if entry.kind == "file" else 0
        total.update(f"{name!r} {entry.kind} {entry.mode} {changed} {len(entry.content)}\n".encode())
        total.update(entry.content)
    return total.hexdigest()


def digest_of_what_is_read(tree: Tree) -> str:
    """The same with what SQLite finds in a database, once it has mended it, for the bytes of its files.

    A database in which a kill has left half a transaction is then the one without it.
    """
    return digest({name: what_is_read(tree, name) for name in tree})


def what_is_read(tree: Tree, name: str) -> Entry:
    """An entry; of a database what SQLite finds in it, once it has mended it, and of the files beside it nothing."""
    entry, base = tree[name], name.removesuffix("-wal").removesuffix("-shm").removesuffix("-journal")
    if not base.endswith(".db") or entry.kind != "file":
        return entry
    files = tuple((end, tree[base + end].content) for end in ("", "-wal", "-journal") if base + end in tree)
    return replace(entry, changed=0, content=_dumped(files) if name == base else b"")


@lru_cache
def _dumped(files: tuple[tuple[str, bytes], ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for end, content in files:
            Path(folder, f"x.db{end}").write_bytes(content)
        with contextlib.closing(sqlite3.connect(Path(folder, "x.db"))) as database:
            assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
            return "\n".join(database.iterdump()).encode()


def put(tree: Tree, folder: Path) -> None:
    """Make `folder` hold just this, with modes, times and hard links. Journals get the inodes of the new files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    numbers: dict[int, Path] = {}
    for name, entry in tree.items():
        path = folder / name
        if entry.kind == "folder":
            path.mkdir()
        elif entry.kind == "link":
            path.symlink_to(os.fsdecode(entry.content))
        elif entry.number in numbers:
            path.hardlink_to(numbers[entry.number])
        else:
            path.write_bytes(entry.content)
            numbers[entry.number] = path
    for name in tree:
        if name.rpartition("/")[2] == JOURNAL:
            _renumber(folder / name, {old: path.stat().st_ino for old, path in numbers.items()})
    for name, entry in reversed(tree.items()):  # what is in a folder first, so that its own time stays
        if entry.kind != "link":
            (folder / name).chmod(entry.mode)
            os.utime(folder / name, ns=(entry.changed, entry.changed))


def _renumber(journal: Path, numbers: dict[int, int]) -> None:
    with contextlib.suppress(ValueError):  # half written
        data = json.loads(journal.read_bytes())
        known = {name: stamp and [*stamp[:2], numbers.get(stamp[2], 0)] for name, stamp in data.items()}
        journal.write_text(json.dumps(known))
