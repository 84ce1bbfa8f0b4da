"""A piece of work as a machine of the cluster does it: taken from its bytes, its result written into the shared folder."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.runtime import return_freed_memory


def entrance() -> Callable[..., None]:
    """The function that Ray calls; it is defined in here so that it is sent as it is, not as a name to import."""

    def do_piece(
        root: str, cwd: str, environment: Mapping[str, str], piece: bytes, folder: str, gpus: float, cpus: int
    ):
        import os
        import sys

        os.environ.update(environment)  # before torch and the libraries of the hub are imported
        os.chdir(cwd)
        if root not in sys.path:
            sys.path.insert(0, root)
        from utils.workers.ray_piece import do_and_keep

        do_and_keep(piece, folder, gpus, cpus)

    return do_piece


def do_and_keep(piece_bytes: bytes, folder: str, gpus: float, cpus: int) -> None:
    """Do a piece on this machine and keep its result in `folder`, unless it is there.

    Raises:
        UserError: what the piece raises; no GPU here for a share of one; a folder that is not there.
    """
    import torch

    from utils.workers.local import kept
    from utils.workers.piece import Piece
    from utils.workers.results import find_result

    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{os.uname().nodename} does not see {folder}", "workers-folder-unseen")
    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"{os.uname().nodename}: torch {torch.__version__} sees no GPU there, but Ray gave it one; install a torch "
            "that fits its driver, or give --ray_gpus 0",
            "workers-no-gpu",
        )
    torch.set_num_threads(cpus)
    piece: Piece = pickle.loads(piece_bytes)
    if find_result(place, piece) is not None:
        return
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    kept(piece, device, lambda step: return_freed_memory(), place)


def environment() -> dict[str, str]:
    """What processes there have to have in common with this one: where the hub's files lie, and that nothing is fetched."""
    from huggingface_hub import constants

    return {
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_HUB_OFFLINE": "1",  # what is needed was fetched here, into a folder that all machines see
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def to_bytes(piece: Any) -> bytes:
    """A piece with its arguments, for another process."""
    return pickle.dumps(piece, protocol=pickle.HIGHEST_PROTOCOL)
