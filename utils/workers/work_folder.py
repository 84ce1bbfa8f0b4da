"""The folder that the results of a run's pieces lie in: named after what was asked, so that only the same run goes on there."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError, warn
from utils.publishing.disk import remove_tree
from utils.publishing.kept import RESTART, note_kept
from utils.publishing.manifest import sha256_of
from utils.workers.results import finished_and_begun, remove_changed, remove_unfinished

_DIGITS = 20
_FORM = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


def folder_name(request: Mapping[str, Any]) -> str:
    """A folder name that equal requests share and others do not; a request is plain data."""
    return sha256_of(request)[:_DIGITS]


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

    Results of other requests in `parent` are removed, what is not named like results stays. The caller holds a lock on the
    folder that `parent` lies in.

    Args:
        parent: hidden, on the file system of the results.
        request: everything that the results depend on, as plain data.
        keep: whether results stay for the next run of the same request when an error or a signal stops this one; the
            exception carries them then (`utils/publishing/kept.py`).
        is_of_use: whether that run could still go on with them, asked once something has stopped this one.
        anew: how to throw them away, as a clause.

    Raises:
        UserError: `parent` is a link or a file, or holds a link.
    """
    refuse_in_the_way(parent)
    folder = parent / folder_name(request)
    for other in parent.iterdir() if parent.is_dir() else ():
        if _is_ours(other) and (other != folder or not keep):
            remove_tree(other)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if changed := remove_changed(folder):
            warn([f"finished work that is not as it was left is made again: {', '.join(changed)}"])
        yield folder
    except BaseException as error:
        remove_unfinished(folder)
        if keep and any(finished_and_begun(folder)) and is_of_use():
            note_kept(error, folder, anew)
        else:
            remove_work(parent)
        raise
    remove_work(parent)


def refuse_in_the_way(parent: Path) -> None:
    """Raise a `UserError` if what lies where work is done is no folder that a run of ours has made there."""
    for path in (parent, *(parent.iterdir() if parent.is_dir() else ())):
        if path.is_symlink() or (path == parent and os.path.lexists(path) and not path.is_dir()):
            raise UserError(
                f"{path} is in the way: it is a link or a file, and a run works in that folder and removes what lies there. "
                f"Move it away; for another disk choose another folder than {parent.parent}",
                "out-in-the-way",
            )


def remove_work(parent: Path) -> None:
    """Remove the results of all requests; what has another name than theirs stays, and a warning says so."""
    if not parent.is_dir():
        return
    if not (others := sorted(path.name for path in parent.iterdir() if not _is_ours(path))):
        remove_tree(parent)
        return
    for path in filter(_is_ours, parent.iterdir()):
        remove_tree(path)
    warn([f"{parent} holds {', '.join(others[:5])}, which no run has put there: it stays"])


def _is_ours(path: Path) -> bool:
    return bool(_FORM.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
