"""Pieces of work for tests of those who do them: functions that another process can import."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import UserError
from utils.workers.piece import Piece, Place


@dataclass(frozen=True)
class Doubled:
    """A number, twice it, and as many zeros."""

    number: int
    twice: int
    zeros: torch.Tensor


def double(place: Place, number: int, log: Path) -> Doubled:
    """Note in `log` that it was done, and write a file beside the result."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{number} {os.getpid()}\n")
    if place.folder is not None:
        (place.folder / "words.txt").write_text("x" * number)
    place.on_step(0)
    return Doubled(number, 2 * number, torch.zeros(number))


def refuse(place: Place, why: str) -> None:
    """Raise what a user can mend."""
    raise UserError(why, "test-refused")


def leave_snapshots(place: Place) -> None:
    """Write where it stands, as work that takes long does."""
    for path in (place.snapshot, place.snapshot.with_suffix(".sums")):
        path.write_text("half way")


def go_on(place: Place, key: str) -> str:
    """What a snapshot has under a key, and "begun" without one."""
    if place.snapshot.exists():
        if (found := json.loads(place.snapshot.read_text())[key]) is None:
            raise OSError("the file that the state is of ends at 0 bytes")
        return found
    if place.snapshot.with_suffix(".sums").exists():
        raise ValueError("what belongs to a snapshot is there without it")
    return "begun"


def threads(place: Place) -> tuple[int, str]:
    """Torch's threads and the device."""
    return torch.get_num_threads(), str(place.device)


def stop_the_first_time(place: Place, mark: Path) -> str:
    """End the process at once, as a machine that is switched off would, but only for whoever comes first."""
    if not mark.exists():
        mark.write_text("")
        os._exit(1)
    return "done"


def stop(place: Place) -> None:
    """End the process at once."""
    os._exit(1)


def sum_slowly(place: Place, seed: int, seconds: float) -> torch.Tensor:
    """Sums that only come out alike where the same is computed in the same order."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    time.sleep(seconds)
    return values.cumsum(0)


def doubling(count: int, log: Path) -> list[Piece]:
    """Pieces that double their numbers."""
    return [Piece(f"piece{number}", double, (number, log), 1, types=(Doubled,)) for number in range(count)]
