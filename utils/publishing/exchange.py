"""Two folders of one file system change places in one step, so that nobody ever sees neither.

Source: renameat2(2) with RENAME_EXCHANGE, Linux 3.15; most of its file systems have it (ext4, xfs, btrfs, tmpfs), network
file systems often do not.
"""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP}


def exchange(first: Path, second: Path) -> bool:
    """Let two paths change places; False, and nothing done, where the system or the file system cannot.

    Raises:
        OSError: it can, but not here: a path is missing, they lie on different file systems.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))
