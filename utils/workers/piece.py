"""A piece of work: a plain function with its arguments, and the name that its result is kept under.

A piece runs in this process or on another machine, so it knows nothing of where: what it computes on, and where it may
write files, is handed to it. What it returns is plain data and tensors on the CPU.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

OnStep = Callable[[int], None]
OnProgress = Callable[[str, int], None]


@dataclass(frozen=True)
class Place:
    """Where a piece runs.

    `device` is what it computes on. `on_step` is to be called with a number after each of its steps. `folder` is an empty
    folder for files that belong to the result; None where results are not kept. `snapshot` is a file that outlives a kill
    until the result is there, for work that takes long; so do files with its name and another ending.
    """

    device: "torch.device"
    on_step: OnStep
    folder: Path | None = None
    snapshot: Path | None = None


@dataclass(frozen=True)
class Piece:
    """One piece of work that needs a device to itself, or a share of it.

    `name` tells it from the others and is a file name. `do` is called with a `Place` and the arguments; to run on another
    machine both have to be picklable. `steps` is how often it will call `on_step`; `label` is shown in messages and beside
    the progress bar. `types` are the classes, beside tensors and Python's own, that its result is made of. `before` names the
    piece that goes on with this one's work: what outlives a kill is that piece's, until its result is there.
    """

    name: str
    do: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    steps: int = 1
    label: str = ""
    types: tuple[type, ...] = ()
    before: str = ""

    @property
    def snapshots(self) -> str:
        """The name of what outlives a kill."""
        return self.before or self.name


class Workers(Protocol):
    """Where pieces run: devices of this machine (`local.py`) or a cluster (`ray_cluster.py`)."""

    def run(self, pieces: "Sequence[Piece]", folder: Path | None, on_progress: OnProgress) -> list[Any]:
        """Do all pieces and return their results in the order of the pieces.

        Args:
            pieces: of distinct names; none depends on another.
            folder: where results are kept, each written once; what is there is not done again. None: they are not kept.
            on_progress: called with a piece's label, and how many more steps are done.

        Raises:
            UserError: what a piece raises; results that were there by then are kept.
        """


def run_piece(piece: Piece, place: Place) -> Any:
    """Do a piece here.

    Raises:
        UserError: what the piece raises; a GPU that ran out of memory.
    """
    import torch

    # a model's own kernels may be written for the current GPU, which is another one where several compute side by side
    current = torch.cuda.device(place.device) if place.device.type == "cuda" else contextlib.nullcontext()
    try:
        with current:
            return piece.do(place, *piece.arguments)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"{piece.label or piece.name}: the GPU ran out of memory; lower --micro_batch_tokens, nsamples or seqlen, or "
            "use --device cpu",
            "device-out-of-memory",
        ) from error
