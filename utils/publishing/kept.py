"""Finished work that outlives what stopped a command: where it lies, what it takes, and the sentence that says so.

A signal, a full disk, an input that is refused after hours: whatever ends a command, the exception carries what stays, and
`run_command` has its sentence follow the message.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from utils.publishing.disk import bytes_on_disk
from utils.runtime import gigabytes

RESTART = "--restart begins again"


@dataclass(frozen=True)
class KeptWork:
    """A folder of finished work. `anew` says how to throw it away, as a clause."""

    folder: Path
    nbytes: int
    anew: str

    def __str__(self) -> str:
        """A sentence without its end. That room is taken there is worth knowing where the disk is full."""
        return (
            f"what is finished stays in {self.folder}, where it takes {gigabytes(self.nbytes)}: once what stopped it "
            f"is mended, the same line goes on from it unless an input changes, {self.anew}"
        )


def note_kept(error: BaseException, folder: Path, anew: str = RESTART) -> None:
    """Have an exception carry that a folder stays."""
    nbytes = 0
    with contextlib.suppress(OSError):  # a disk that fails; the work is there all the same
        nbytes = bytes_on_disk(folder)
    error.kept = KeptWork(folder, nbytes, anew)


def kept_work(error: BaseException) -> KeptWork | None:
    """What stays, if anything does."""
    return getattr(error, "kept", None)
