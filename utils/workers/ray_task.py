"""A piece of work as a machine of the cluster does it: taken from its bytes, its result written into the shared folder."""

import os
import pickle
from pathlib import Path

from utils.errors import UserError
from utils.exact_products import alone_in_process
from utils.runtime import return_freed_memory
from utils.workers.local import kept
from utils.workers.piece import Piece
from utils.workers.results import find_result


def do_and_keep(piece_bytes: bytes, folder: str, gpus: float, cpus: int) -> None:
    """Do a piece on this machine and keep its result in `folder`, unless it is there.

    Raises:
        UserError: what the piece raises; no GPU here for a share of one; a folder that is not there.
    """
    import torch

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
    with alone_in_process():
        kept(piece, device, lambda step: return_freed_memory(), place)
