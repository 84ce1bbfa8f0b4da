"""Content and names reach the disk, where the file system can say so."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError, warn

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}


def free_bytes(folder: Path) -> tuple[int, Path]:
    """Bytes free where a folder is or will be, and the folder that is there already."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder


def bytes_on_disk(folder: Path) -> int:
    """What the files below a folder take of the disk; hard links to one count once, holes not at all."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return 512 * sum({(one.st_dev, one.st_ino): one.st_blocks for one in found}.values())


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Let an error of the system name what could not be written; the system does not where the file is open already."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_through(path: Path, content: bytes | None) -> None:
    """Write a file, or take it as it is, and have it reach the disk."""
    with named_in_errors(path), open(path, "r+b" if content is None else "wb") as file:
        if content is not None:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where its file system can say so; the files are complete either way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with named_in_errors(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_published(folder: Path) -> None:
    """`sync_folder` for a folder whose new content is in its place.

    Raises:
        UserError: the system could not say that the names reached the disk.
    """
    try:
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the result is complete and in its place, but the system could not confirm that it reached the "
            f"disk ({error.strerror}); check the disk before you rely on it",
            "out-not-synced",
        ) from error


def remove_tree(folder: Path) -> bool:
    """Remove a folder of this project's own; what an error stops is tried once more, then a warning says what is left.

    Returns:
        Whether nothing is left.
    """
    if not _not_removed(folder) or not (failures := _not_removed(folder)):
        return True
    why = failures[0].strerror or failures[0]
    warn([f"{folder} is of no use any more, but could not be removed ({why}): remove it"])
    return False


def _not_removed(folder: Path) -> list[OSError]:
    found: list[OSError] = []
    shutil.rmtree(folder, onerror=lambda call, path, failure: found.append(failure[1]))
    return [one for one in found if not isinstance(one, FileNotFoundError)]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for a run that published nothing, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
