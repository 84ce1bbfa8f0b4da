"""Which tensors of an unfinished merge are complete on the disk, so that a run after a kill need not make them again.

A text file beside the weights: the hash of the request in the first line, then a tensor's name and checksum in each. A line
is added once the tensor's last byte has reached the disk, so a file that ends anywhere is still true.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.models.shard_files import TensorSpec
from utils.publishing.disk import write_through

SECONDS = 5.0  # between two times that names are added


class FinishedTensors:
    """The list of one folder; without a path nothing is kept."""

    def __init__(self, path: Path | None, request: str) -> None:
        """Read the list that is there, if it is of the same request. `damage` says what is wrong with it, as a clause."""
        self._path, self._request, self.damage = path, request, ""
        try:
            self.sums: Mapping[str, int] = dict(self._read())  # the tensors' checksums
        except (ValueError, TypeError):  # no UTF-8, no JSON, no text: not what was written here
            self.forget(f"{path.name} is damaged")

    def forget(self, damage: str) -> None:
        """Take nothing for finished, since what lies there is not as it was left; the caller removes the weights."""
        self.sums, self.damage = {}, damage
        self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def kept_up(
        self, specs: Sequence[TensorSpec], sync: Callable[[], None], sum_of: Callable[[str], int]
    ) -> Iterator[Callable[[str, int], None]]:
        """Yield what takes the name of a tensor and how many bytes more of it are written, from one thread.

        Args:
            specs: all tensors.
            sync: has what was written reach the disk.
            sum_of: the checksum of a tensor that is written.
        """
        missing = {spec.name: spec.nbytes for spec in specs}
        complete: list[str] = []
        saved = time.monotonic()

        def note(name: str, nbytes: int) -> None:
            nonlocal saved
            missing[name] -= nbytes
            if not missing[name]:
                complete.append(name)
            if time.monotonic() - saved > SECONDS:
                self._add(complete, sync, sum_of)
                saved = time.monotonic()

        try:
            yield note
        except BaseException:
            with contextlib.suppress(OSError, UserError):  # what stopped the merge is what to report
                self._add(complete, sync, sum_of)
            raise
        self._add(complete, sync, sum_of)

    def add_all(self, sums: Mapping[str, int]) -> None:
        """Add tensors, by their checksums, whose files lie beside the list and are complete.

        Raises:
            OSError: the disk is full or broken.
        """

        def sync() -> None:
            for file in self._path.parent.glob("*.safetensors"):
                write_through(file, None)

        self._add(list(sums), sync, sums.__getitem__)

    def _add(self, complete: list[str], sync: Callable[[], None], sum_of: Callable[[str], int]) -> None:
        """Have tensors reach the disk, then their names. Those of which the disk has once refused one are never added: a
        second `fsync` succeeds, whatever became of their bytes.

        Raises:
            OSError, UserError: the disk is full or broken; the list is as it was.
        """
        if self._path is None or not complete:
            return
        names = complete.copy()
        complete.clear()
        lines = [json.dumps([name, sum_of(name)]) for name in names]
        sync()
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in (*([] if before else [json.dumps(self._request)]), *lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if before:
                os.truncate(self._path, before)
            else:
                self._path.unlink(missing_ok=True)
            raise

    def _read(self) -> Iterator[tuple[str, int]]:
        if self._path is None or not self._path.is_file():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed in the middle of a line
            os.truncate(self._path, len(whole))
        request, *lines = whole.decode().splitlines() or [""]
        if request == json.dumps(self._request):
            for name, found in map(json.loads, lines):
                if not isinstance(name, str) or not isinstance(found, int):
                    raise TypeError(f"{name!r} and {found!r} are no name and checksum")
                yield name, found
