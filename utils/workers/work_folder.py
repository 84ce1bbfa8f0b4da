"""The folder that the results of a run's pieces lie in: named after what was asked, so that only the same run goes on there."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.publishing.disk import remove_tree
from utils.publishing.manifest import sha256_of
from utils.workers.results import remove_unfinished


def folder_name(request: Mapping[str, Any]) -> str:
    """A folder name that equal requests share and others do not; a request is plain data."""
    return sha256_of(request)[:20]


@contextlib.contextmanager
def work_folder(
    parent: Path, request: Mapping[str, Any], *, keep: bool, through_interrupts: bool = False
) -> Iterator[Path]:
    """The folder of a request's results, inside `parent`, which holds nothing else; gone once the context ends well.

    Results of other requests in `parent` are removed. The caller holds a lock on the folder that `parent` lies in.

    Args:
        parent: hidden, on the file system of the results.
        request: everything that the results depend on, as plain data.
        keep: whether results stay after an error, for the next run of the same request.
        through_interrupts: whether they stay after a signal; with neither they never stay.
    """
    folder = parent / folder_name(request)
    for other in parent.iterdir() if parent.is_dir() else ():
        if other != folder or not (keep or through_interrupts):
            remove_tree(other)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        yield folder
    except BaseException as error:
        remove_unfinished(folder)
        kept = keep or (through_interrupts and isinstance(error, KeyboardInterrupt))
        if not kept or not any(folder.glob("*")):
            remove_tree(parent)
        elif isinstance(error, KeyboardInterrupt):
            error.kept = folder  # for the command's last words
        raise
    remove_tree(parent)
