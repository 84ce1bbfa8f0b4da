"""Paths: whether every library can open one, and what of one may be published."""

import os
import sys
from pathlib import Path

from utils.errors import UserError


def check_path(path: str | Path, what: str) -> None:
    """Check that a path can be named in UTF-8, whether anything is there or not: tokenizers and safetensors open no other.

    Args:
        path: the path, absolute where the folders above it matter, too.
        what: what to call it in a message.

    Raises:
        UserError: it holds bytes that are not UTF-8, or characters that the locale of this process cannot name.
    """
    text = os.fspath(path)
    try:
        text.encode()
        os.fsencode(text)
    except UnicodeEncodeError as error:
        if _is_utf8(text):
            raise UserError(
                f"{what}: the locale, whose encoding is {sys.getfilesystemencoding()}, cannot name {text!a}; set "
                "PYTHONUTF8=1 in the environment",
                "path-locale",
            ) from error
        raise UserError(
            f"{what}: the path {text!a} holds bytes that are not UTF-8, which the libraries for models cannot open; "
            "rename it",
            "path-not-utf8",
        ) from error


def without_folders(name: str) -> str:
    """A name of a model or a file as it may be published: the last part alone of an absolute path, any other as it is."""
    path = os.path.expanduser(name)
    return Path(path).name if os.path.isabs(path) else name


def _is_utf8(text: str) -> bool:
    """Whether a path is UTF-8 to others, whatever the locale of this process makes of it."""
    try:
        text.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError:
        return False
    return True
