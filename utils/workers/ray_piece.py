"""A piece of work as it is sent to a machine of the cluster: its bytes, and the function that takes them there."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


def entrance() -> Callable[..., None]:
    """The function that Ray calls; it is defined in here so that it is sent as it is, not as a name to import."""

    def do_piece(cwd: str, piece: bytes, folder: str, gpus: float, cpus: int) -> None:
        import os

        from utils.workers.ray_task import do_and_keep

        os.chdir(cwd)
        do_and_keep(piece, folder, gpus, cpus)

    return do_piece


def environment(root: Path) -> dict[str, str]:
    """The environment of processes there: where this project and the hub's files lie, and that nothing is fetched."""
    from huggingface_hub import constants

    return {
        "PYTHONPATH": str(root),
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_HUB_OFFLINE": "1",  # what is needed was fetched here, into a folder that all machines see
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def to_bytes(piece: Any) -> bytes:
    """A piece with its arguments, for another process."""
    return pickle.dumps(piece, protocol=pickle.HIGHEST_PROTOCOL)
