"""Having the system read weights from the disk while this process is still busy with something else."""

import contextlib
import os
import threading
from collections.abc import Iterable

from utils.models.checkpoints import Checkpoint
from utils.models.headers import TensorHeader

AHEAD = 4 * 2**30  # bytes asked for at most: what a fast disk reads while libraries are imported


def read_ahead(checkpoints: Iterable[Checkpoint], limit: int) -> threading.Thread | None:
    """Ask the system to bring the beginning of a merge's inputs into its page cache; returns at once.

    Asking can wait for the disk, so a thread does it that does not keep the process alive. Nothing is read into this
    process, and files that are in memory already cost nothing.

    Args:
        checkpoints: the inputs.
        limit: most bytes to ask for.

    Returns:
        The thread, or None where the system takes no such hints.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    wanted = list(first_bytes(checkpoints, limit))
    thread = threading.Thread(target=_ask, args=(wanted,), daemon=True, name="read-ahead")
    thread.start()
    return thread


def first_bytes(checkpoints: Iterable[Checkpoint], limit: int) -> Iterable[TensorHeader]:
    """The tensors of several checkpoints in the order in which a merge reads them (by name), up to `limit` bytes."""
    headers = (header for checkpoint in checkpoints for header in checkpoint.tensors.values())
    for header in sorted(headers, key=lambda header: (header.name, header.file)):
        limit -= header.nbytes
        if limit < 0:
            return
        yield header


def _ask(headers: Iterable[TensorHeader]) -> None:
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # it was only a hint
        files: dict[os.PathLike[str], int] = {}
        for header in headers:
            if header.file not in files:
                files[header.file] = os.open(header.file, os.O_RDONLY)
                stack.callback(os.close, files[header.file])
            os.posix_fadvise(files[header.file], header.start, header.nbytes, os.POSIX_FADV_WILLNEED)
