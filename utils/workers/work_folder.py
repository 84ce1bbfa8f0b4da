"""The folder that the results of a run's pieces lie in: named after what was asked, so that only the same run goes on there."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.publishing.disk import remove_tree
from utils.publishing.kept import RESTART, note_kept
from utils.publishing.manifest import sha256_of
from utils.workers.results import finished_and_begun, remove_unfinished


def folder_name(request: Mapping[str, Any]) -> str:
    """A folder name that equal requests share and others do not; a request is plain data."""
    return sha256_of(request)[:20]


@contextlib.contextmanager
def work_folder(
    parent: Path,
    request: Mapping[str, Any],
    *,
    keep: bool,
    is_of_use: Callable[[], bool] = lambda: True,
    anew: str = RESTART,
) -> Iterator[Path]:
    """The folder of a request's results, inside `parent`, which holds nothing else; gone once the context ends well.

    Results of other requests in `parent` are removed. The caller holds a lock on the folder that `parent` lies in.

    Args:
        parent: hidden, on the file system of the results.
        request: everything that the results depend on, as plain data.
        keep: whether results stay for the next run of the same request when an error or a signal stops this one; the
            exception carries them then (`utils/publishing/kept.py`).
        is_of_use: whether that run could still go on with them, asked once something has stopped this one.
        anew: how to throw them away, as a clause.
    """
    folder = parent / folder_name(request)
    for other in parent.iterdir() if parent.is_dir() else ():
        if other != folder or not keep:
            remove_tree(other)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        yield folder
    except BaseException as error:
        remove_unfinished(folder)
        if keep and any(finished_and_begun(folder)) and is_of_use():
            note_kept(error, folder, anew)
        else:
            remove_tree(parent)
        raise
    remove_tree(parent)
