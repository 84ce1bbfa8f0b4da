"""Pieces of work on this machine: one after another, or side by side on several devices."""

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief, is_memory, warn
from utils.exact_products import alone_in_process
from utils.runtime import return_freed_memory
from utils.workers.piece import OnProgress, Piece, Place, run_piece
from utils.workers.results import find_result, has_snapshots, kept_result, remove_snapshots

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LocalWorkers:
    """Devices of this machine (`Workers`): each has one piece at a time, a single one up to `at_once`.

    `say` takes a line if pieces share a device's threads. `shares` is how many pieces share torch's threads on a CPU, None:
    as many as go side by side. The last bits of a sum depend on how many threads share it: a piece has as many whichever of
    the others are there already, and however many go side by side now.
    """

    devices: "tuple[torch.device, ...]"
    at_once: int = 1
    say: Callable[[str], None] = lambda line: None
    shares: int | None = None

    def run(self, pieces: Sequence[Piece], folder: Path | None, on_progress: OnProgress) -> list[Any]:
        """Do all pieces in threads of this process; as `Workers.run`."""
        results: dict[str, Any] = {}
        for piece in pieces if folder is not None else ():
            if (found := find_result(folder, piece)) is not None:
                results[piece.name] = found.value
                on_progress(piece.label, piece.steps)
        left = [piece for piece in pieces if piece.name not in results]
        results |= dict(
            zip((piece.name for piece in left), self._run(left, len(pieces), folder, on_progress), strict=True)
        )
        return [results[piece.name] for piece in pieces]

    def _run(self, pieces: Sequence[Piece], of: int, folder: Path | None, on_progress: OnProgress) -> list[Any]:
        """Do pieces, those of so many that are left."""
        lanes = self.devices if len(self.devices) > 1 else self.devices * self.at_once
        shares = min(self.shares or len(lanes), of)
        lanes = lanes[: min(shares, len(pieces))]
        if len(lanes) > len(self.devices):
            self.say(f"side by side: {len(lanes)} models at a time share the threads")
        free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
        for device in lanes:
            free.put(device)
        given_up = threading.Event()

        def do(piece: Piece) -> Any:
            device = free.get()

            def on_step(number: int) -> None:
                return_freed_memory()  # else the freed temporaries of block after block pile up
                on_progress(piece.label, 1)
                if given_up.is_set():
                    raise concurrent.futures.CancelledError

            on_progress(piece.label, 0)
            try:
                return kept(piece, device, on_step, folder)
            finally:
                free.put(device)

        with _shared_threads(lanes, shares), alone_in_process() if shares <= 1 else contextlib.nullcontext():
            if len(lanes) <= 1:
                return [do(piece) for piece in pieces]
            with concurrent.futures.ThreadPoolExecutor(len(lanes), thread_name_prefix="piece") as pool:
                try:
                    return list(pool.map(do, pieces))
                except BaseException:
                    given_up.set()
                    pool.shutdown(cancel_futures=True)
                    raise


def kept(piece: Piece, device: "torch.device", on_step: Callable[[int], None], folder: Path | None) -> Any:
    """Do a piece here, and write its result if there is a folder for it: what is returned then are pages of that file.

    A snapshot may be whole and yet no state of this piece, where somebody has changed it with its checksums: what then goes
    wrong, in whatever way, is warned of, and the piece is done once more from its beginning.
    """
    if folder is None:
        return run_piece(piece, Place(device, on_step))
    goes_on = has_snapshots(folder, piece.snapshots)
    try:
        value = _kept(piece, device, on_step, folder)
    except (UserError, concurrent.futures.CancelledError):
        raise
    except Exception as error:
        by_the_system = isinstance(error, OSError) and error.errno is not None
        if not goes_on or by_the_system or is_memory(error):
            raise
        words = f"{type(error).__name__}: {brief(error)}"
        warn([f"{piece.label or piece.name} could not be gone on with ({words}): it is made again from its beginning"])
        remove_snapshots(folder, piece.snapshots)
        value = _kept(piece, device, on_step, folder)
    found = find_result(folder, piece)
    return value if found is None else found.value


def _kept(piece: Piece, device: "torch.device", on_step: Callable[[int], None], folder: Path) -> Any:
    with kept_result(folder, piece) as keeping:
        value = run_piece(piece, Place(device, on_step, keeping.stage, keeping.snapshot))
        keeping.keep(value)
        remove_snapshots(folder, piece.name)
    return value


@contextlib.contextmanager
def _shared_threads(lanes: "Sequence[torch.device]", shares: int) -> Iterator[None]:
    """Give pieces on the CPU, which start meanwhile, one of so many shares of torch's threads each."""
    import torch

    before = torch.get_num_threads()
    if lanes and lanes[0].type == "cpu":
        torch.set_num_threads(max(1, before // shares))
    try:
        yield
    finally:
        torch.set_num_threads(before)
