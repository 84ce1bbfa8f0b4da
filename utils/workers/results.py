"""Results of pieces in a folder: each a folder of its own, written under a temporary name and renamed, so that it is whole.

<folder>/<piece>/result.pt     plain data and tensors, read without running code from it
<folder>/<piece>/sums.json     checksums of the other files, compared once when a later run begins
<folder>/<piece>/...           files that the piece wrote itself
<folder>/<piece>.snapshot      where an unfinished piece stands, with files of other endings beside it
"""

import contextlib
import errno
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.publishing.checksums import file_checksum
from utils.publishing.disk import named_in_errors, remove_tree, sync_folder
from utils.publishing.manifest import to_json
from utils.workers.piece import Piece

_RESULT, _SUMS = "result.pt", "sums.json"
_SUFFIX = ".part"
_SNAPSHOT = ".snapshot"
_ALONE = (_SNAPSHOT, ".forward")  # endings of files that are each enough to go on from; others belong to a snapshot
_UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Found:
    """A result that is there; its own value may be None."""

    value: Any


@dataclass(frozen=True)
class KeptResult:
    """Where a piece's result is, for pieces that work on it."""

    folder: Path
    piece: str
    types: tuple[type, ...] = ()

    def read(self) -> Any:
        """The result.

        Raises:
            FileNotFoundError: it is not there, or cannot be read.
        """
        if (found := _find(self.folder / self.piece, self.types)) is None:
            raise FileNotFoundError(f"no result of {self.piece} in {self.folder}")
        return found.value


def find_result(folder: Path, piece: Piece) -> Found | None:
    """A piece's result, or None if it is not there or cannot be read. Tensors are pages of the file until they are changed."""
    return _find(folder / piece.name, piece.types)


def kept_value(folder: Path, name: str, types: Sequence[type] = ()) -> Any:
    """The value of the result of a piece of this name, or None if it is not there."""
    found = _find(folder / name, types)
    return None if found is None else found.value


def _find(place: Path, types: Sequence[type]) -> Found | None:
    import torch

    if not (place / _RESULT).is_file():  # a pipe would keep whoever opens it waiting
        return None
    try:
        with torch.serialization.safe_globals(list(types)):
            data = torch.load(place / _RESULT, map_location="cpu", mmap=True, weights_only=True)
        return Found(data["value"]) if all((place / name).is_file() for name in data["files"]) else None
    except _UNREADABLE:  # not there; or a disk that was full, a power cut: the piece is done again
        return None


@contextlib.contextmanager
def kept_result(folder: Path, piece: Piece) -> Iterator["Keeping"]:
    """Write a piece's result: its files go into `stage` of what this yields, `keep` makes all of it appear.

    Where somebody else has written the same result meanwhile (a task that was thought lost), theirs stays.
    """
    stage = Path(tempfile.mkdtemp(prefix=f".{piece.name}.", suffix=_SUFFIX, dir=folder))
    try:
        yield Keeping(stage, folder, piece)
    finally:
        remove_tree(stage)


@dataclass(frozen=True)
class Keeping:
    """A result that is being written in `stage`, of `piece`, for `folder`."""

    stage: Path
    folder: Path
    piece: Piece

    @property
    def snapshot(self) -> Path:
        """The file that the piece may go on from after a kill; others may lie beside it, with other endings."""
        return self.folder / f"{self.piece.snapshots}{_SNAPSHOT}"

    def keep(self, value: Any) -> None:
        """Write the value beside the files and give the folder its name."""
        import torch

        files = sorted(path.name for path in self.stage.iterdir())
        with named_in_errors(self.stage / _RESULT), open(self.stage / _RESULT, "wb") as file:
            torch.save({"value": value, "files": files}, file)
        sums = {name: file_checksum(self.stage / name) for name in (_RESULT, *files)}
        with named_in_errors(self.stage / _SUMS):
            (self.stage / _SUMS).write_bytes(to_json(sums))
        for name in (_RESULT, *files, _SUMS):
            with named_in_errors(self.stage / name), open(self.stage / name, "rb") as file:
                os.fsync(file.fileno())
        target = self.folder / self.piece.name
        try:
            os.rename(self.stage, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if find_result(self.folder, self.piece) is None:  # what lies there is no result
                shutil.rmtree(target)
                os.rename(self.stage, target)
        sync_folder(self.folder)


def has_snapshots(folder: Path, name: str) -> bool:
    """Whether there is something to go on from under a name."""
    return any((folder / f"{name}{ending}").is_file() for ending in _ALONE)


def remove_snapshots(folder: Path, name: str) -> None:
    """Remove the snapshot of a name and those beside it: the result is there, or they cannot be gone on from."""
    for path in folder.iterdir():
        if path.stem == name and path.is_file():  # a folder is another piece's result
            path.unlink(missing_ok=True)


def finished_and_begun(folder: Path) -> tuple[int, int]:
    """How many results a folder holds, and how many snapshots of unfinished pieces."""
    left = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    return sum(path.is_dir() for path in left), len({path.stem for path in left if path.suffix in _ALONE})


def remove_changed(folder: Path) -> list[str]:
    """Remove results that are not as they were left; their names."""
    changed = [
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and _is_changed(path)
    ]
    for path in changed:
        remove_tree(path)
    return sorted(path.name for path in changed)


def _is_changed(result: Path) -> bool:
    try:
        sums = read_json(result / _SUMS, _SUMS)
        plain = _RESULT in sums and all((result / name).is_file() for name in sums)  # a pipe would keep us waiting
        return not plain or any(file_checksum(result / name) != found for name, found in sums.items())
    except (UserError, OSError):  # no list, a file is missing, a disk that fails
        return True


def remove_unfinished(folder: Path) -> None:
    """Remove what runs that were stopped have left half-written: results, snapshots, and files of snapshots that are not there."""
    for path in folder.glob(f".*{_SUFFIX}"):
        remove_tree(path)
    for path in folder.iterdir() if folder.is_dir() else ():
        whole = path.suffix in _ALONE or (path.suffix != ".writing" and path.with_suffix(_SNAPSHOT).exists())
        if path.is_file() and not path.name.startswith(".") and not whole:
            path.unlink(missing_ok=True)
