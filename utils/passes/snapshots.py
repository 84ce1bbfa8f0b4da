"""Where a pass through a model's blocks stands, on disk at least every five minutes, so that a kill costs no more.

A snapshot holds what the last block returned for every micro-batch and what has been measured so far. To go on, the model's
own forward runs again with the blocks that are done left out: each of them seems to return what the last one did. Whatever
else the next block is given is compared with what it was given then; a model that hands on more than hidden states from block
to block begins anew.
"""

import contextlib
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import warn

SECONDS = 300.0
MOST_SHARE = 0.05  # of the time that snapshots may take


@dataclass(frozen=True)
class Snapshot:
    """The state in front of block `layer`: by micro-batch the output of the block before and digests of the next one's
    other arguments, and what the visitor has measured."""

    layer: int
    outputs: list[Any]
    around: list[list[float]]
    state: Any


class Pauses:
    """When the next snapshot is due: after five minutes, later where they would take more than their share of the time."""

    def __init__(self) -> None:
        """Begin a pause."""
        self._last, self._pause = time.monotonic(), SECONDS

    def over(self) -> bool:
        """Whether a snapshot is due."""
        return time.monotonic() - self._last >= self._pause

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """A snapshot is made inside; the next pause begins after it."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        self._pause = max(SECONDS, (self._last - start) / MOST_SHARE)


class Snapshots:
    """The snapshot of one pass; without a path none is made."""

    def __init__(self, path: Path | None, *, outlives_pass: bool = False) -> None:
        """Take the file. `outlives_pass`: until it is forgotten, since what is made of the pass is not whole with its end."""
        self._path, self._stopped, self._outlives_pass = path, False, outlives_pass
        self._pauses = Pauses()

    def load(self) -> Snapshot | None:
        """The snapshot that a killed run has left, None if there is none that can be read."""
        return read_state(self._path, lambda found: Snapshot(**found))

    def offer(
        self, layer: int, outputs: Sequence[Any], around: Sequence[list[float]], state: Callable[[], Any]
    ) -> None:
        """Write a snapshot if it is time for one and the outputs are hidden states alone; none after one that failed."""
        if self._path is None or self._stopped or not self._pauses.over() or not all(map(_is_plain, outputs)):
            return
        with self._pauses.snapshot():
            data = {"layer": layer, "outputs": list(outputs), "around": list(around), "state": state()}
            try:
                write_state(self._path, data)
            except OSError as error:
                self._stopped = True
                warn_without(self._path, error)

    def pass_over(self) -> None:
        """The pass has ended well."""
        if not self._outlives_pass:
            self.forget()

    def forget(self) -> None:
        """Nothing is gone on with from here."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def read_state(path: Path | None, made: Callable[[Any], Any] = lambda found: found) -> Any | None:
    """What `write_state` has written there, as `made` of it, tensors on the CPU; None, with a warning, if it is not as it was
    left."""
    if path is None or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            changed = file.testzip()  # torch does not compare the checksums that it writes
        if changed is None:
            return made(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # torch raises anything over a damaged file; the work then begins anew
        pass
    warn([f"{path} is not as it was left: what it had come to is made again"])
    return None


def write_state(path: Path, data: Any) -> None:
    """Write plain data and tensors, so that after a kill at any time the old ones are there or the new ones.

    Raises:
        OSError: the disk is full, and so on; the old ones are there.
    """
    part = path.with_suffix(".writing")
    try:
        with open(part, "wb") as file:
            _save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class _Noting:
    """A file that keeps the error of a write: torch raises a `RuntimeError` over it that does not say which it was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.error = file, None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(data: Any, file: BinaryIO) -> None:
    noting = _Noting(file)
    try:
        torch.save(data, noting)
    except RuntimeError as error:
        if noting.error is None:
            raise
        raise noting.error from error


def warn_without(path: Path, error: OSError) -> None:
    """Say that no further snapshots are made, since one is optional."""
    warn(
        [
            f"a snapshot in {path.parent} could not be written ({error.strerror or error}); measuring goes on without, so "
            "that a run after a kill goes on from further back"
        ]
    )


def digests(args: Sequence[Any], kwargs: dict[str, Any]) -> list[float]:
    """A number for every tensor that a block is given; equal for equal tensors."""
    return [_digest(tensor) for tensor in _tensors([*args, *(kwargs[name] for name in sorted(kwargs))])]


def _digest(tensor: Tensor) -> float:
    values = tensor.detach().double().flatten()
    return float((values * torch.arange(1, values.numel() + 1, device=values.device).double().sin()).nan_to_num().sum())


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = [values[key] for key in sorted(values, key=str)]
    return [tensor for one in values for tensor in _tensors(one)] if isinstance(values, (list, tuple)) else []


def _is_plain(output: Any) -> bool:
    if isinstance(output, tuple):
        return all(one is None or isinstance(one, Tensor) for one in output)
    return isinstance(output, Tensor)
