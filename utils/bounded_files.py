"""Small files that somebody else wrote: bounded in size, and regular or read with a limit of time, so that reading one always ends.

A pipe in the place of a `config.json` would keep a reader waiting for ever, and a link to an endless device would fill
the memory.
"""

import json
import math
import os
import re
import select
import stat
from pathlib import Path
from typing import Any

from utils.errors import UserError

PATIENCE = 20.0  # seconds
MOST_BYTES = 64 * 2**20  # of a JSON file; the index of a model with 100,000 tensors has 10 MiB


def read_bounded(path: Path, what: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file; links are followed.
        what: what to call it in a message.
        most: bytes that such a file never exceeds.

    Raises:
        UserError: it is a folder, a pipe or a device, is larger than `most`, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{what} is not a regular file; put a copy of the file there", "file-not-regular")
            content = file.read(min(found.st_size, most) + 1)  # as much memory is taken at once
            if len(content) > found.st_size:  # it grows
                content += file.read(most + 1 - len(content))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{what} cannot be read: {why}", "file-unreadable") from error
    if len(content) > most:
        raise UserError(f"{what} is larger than {most / 2**20:g} MiB: is it the right file?", "file-too-large")
    return content


def read_stream(path: Path, most: int, patience: float = PATIENCE) -> bytes:
    """What a file or a pipe has to read, up to `most` bytes.

    Args:
        path: the file; links are followed.
        most: bytes after which nothing more is read.
        patience: seconds to wait for each piece of it; a pipe may have no writer, or one that is at work on something else.

    Raises:
        TimeoutError: nothing came in that time.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        content = b""
        while len(content) < most:
            # second by second: this process may be stopped meanwhile (Ctrl-Z), and the writer with it
            if not any(waiting.poll(min(1.0, patience) * 1000) for _ in range(max(1, math.ceil(patience)))):
                raise TimeoutError(f"nothing has come out of it for {patience:g} s")
            piece = file.read(most - len(content))
            if piece == b"":
                break
            content += piece or b""
        return content


def read_json(path: Path, what: str, most: int = MOST_BYTES, *, finite: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        what: what to call it in a message.
        most: bytes that such a file never exceeds.
        finite: whether NaN and infinity, which JSON does not know and configs of models hold, are refused.

    Raises:
        UserError: as `read_bounded`; it is not JSON, holds half of a character (`"\\ud800"`), or is not an object.
    """
    content = read_bounded(path, what, most)
    numbers = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    try:
        data = json.loads(content.decode("utf-8-sig"), **numbers)
        if _HALF.search(content):
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error}", "json-invalid") from error
    if not isinstance(data, dict):
        raise UserError(f"{what} must hold a JSON object, but holds a {type(data).__name__}", "json-no-object")
    return data


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # the beginning of a character of two halves, or one that has lost the other


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number; put one in its place, or take its key out")
    return value
