"""Where a model stands on its way forward and back, on disk at least every five minutes, so that a kill costs no more.

The hidden states at every block's entrance, which wait for the way back anyway, wait in files with names then; a snapshot says
where in them, which block is next, what gradients have come back to it, and what has been measured so far. To go on, the
model's own forward runs again, with the blocks that are done left out: each seems to return what it has returned. A model
whose blocks hand on more than tensors begins anew.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.errors import warn
from utils.passes.snapshots import Pauses, read_state, warn_without, write_state
from utils.passes.tensor_store import TensorStore
from utils.publishing.checksums import checksum, file_checksum


class GradientSnapshots:
    """The snapshot of one piece of work; of several models, where they go side by side. Without a path none is made.

    Everything that changes registers a part of it, under a name, once it begins; a snapshot is of all parts at once.
    """

    def __init__(self, path: Path | None) -> None:
        """Take the file, and what a killed run has left in it."""
        self._path, self._stopped = path, False
        self._pauses = Pauses()
        self._stores: dict[str, TensorStore] = {}
        self._growing: dict[str, Callable[[], int]] = {}
        self._parts: dict[str, Callable[[], Any]] = {}
        found = read_state(path, dict) or {}
        self._ends: dict[str, int] = found.get("ends", {})
        self._found: dict[str, Any] = found.get("parts", {})
        self._sums: dict[str, tuple[int, int]] = {}  # of stores' files: bytes gone through, and their checksum
        if any(not self._is_as_left(name, end, found.get("sums", {}).get(name)) for name, end in self._ends.items()):
            warn([f"what lies beside {path} is not as it was left: what it had come to is made again"])
            self._ends, self._found = {}, {}

    def _is_as_left(self, name: str, end: int, found: int | None) -> bool:
        """`found`: the checksum of a store's file; results that are added to another have digests of their own."""
        file = self._file(name)
        is_whole = file.is_file() and file.stat().st_size >= end
        return is_whole and (found is None or file_checksum(file, 0, end) == found)

    def _sum(self, name: str, end: int) -> int:
        """The checksum of the first `end` bytes of a store's file, to which more and more is added."""
        done, found = self._sums.get(name, (0, 0))
        with open(self._file(name), "rb") as file:
            found = checksum(file.fileno(), done, end - done, found)
        self._sums[name] = end, found
        return found

    def _file(self, name: str) -> Path:
        return self._path.with_suffix(f".{name}")

    def store(self, name: str, device: torch.device, folder: Path | None) -> TensorStore:
        """A store whose file outlives a kill, with what a killed run has put there; without a path as `TensorStore`."""
        if self._path is None:
            return TensorStore(device, folder)
        self._sums.pop(name, None)
        self._stores[name] = TensorStore(device, path=self._file(name), end=self._ends.get(name, 0))
        return self._stores[name]

    def growing_file(self, name: str) -> Path | None:
        """The place of a file that results are added to, with what a killed run has put there; None without a path."""
        return None if self._path is None else self._file(name)

    def grow(self, name: str, sync: Callable[[], int]) -> None:
        """Register such a file: `sync` has the disk hold it, and gives its length."""
        self._growing[name] = sync

    def hand_over(self, name: str, target: Path) -> None:
        """Give such a file, which is complete, another name. It keeps its own, where the file system has links, so that a
        run that is killed before the result is kept still goes on from the last snapshot."""
        if self._path is not None:
            try:
                os.link(self._file(name), target)
            except OSError:  # no links in that file system; a disk that fails fails here, too
                os.replace(self._file(name), target)

    def found(self, name: str) -> Any:
        """What a part was when the snapshot of a killed run was made, tensors on the CPU, None without one; given once."""
        return self._found.pop(name, None)

    def keep(self, name: str, state: Callable[[], Any]) -> None:
        """Register a part: `state` gives it as plain data and tensors, None if it cannot be gone on with."""
        self._parts[name] = state

    def offer(self) -> None:
        """Write a snapshot if it is time for one; called where all parts fit together. Raises as `write`."""
        if self._pauses.over():
            self.write()

    def write(self) -> None:
        """Write a snapshot; called where all parts fit together. None after one that failed.

        Raises:
            OSError: tensors that wait in a file alone, or results, cannot reach the disk.
        """
        if self._path is None or self._stopped:
            return
        with self._pauses.snapshot():
            parts = {name: state() for name, state in self._parts.items()}
            if any(part is None for part in parts.values()):
                return
            ends = {name: sync() for name, sync in self._growing.items()}
            ends |= {name: store.sync() for name, store in self._stores.items() if not store.on_host}
            try:
                ends |= {name: store.sync() for name, store in self._stores.items() if store.on_host}
                sums = {name: self._sum(name, ends[name]) for name in self._stores}
                write_state(self._path, {"ends": ends, "sums": sums, "parts": parts})
            except OSError as error:
                self._stopped = True
                for store in self._stores.values():
                    store.leave_file()
                warn_without(self._path, error)

    def forget(self) -> None:
        """The work is over."""
        if self._path is not None:
            for path in (self._path, *map(self._file, (*self._stores, *self._growing))):
                path.unlink(missing_ok=True)
        self._parts.clear()
        self._stores.clear()
        self._growing.clear()
