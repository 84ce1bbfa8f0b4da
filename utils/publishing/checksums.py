"""Checksums of finished work, so that what changed in a hidden folder meanwhile is not gone on with: CRC-32, 3 GB a second."""

import os
import zlib
from pathlib import Path

from utils.publishing.disk import named_in_errors

CHUNK = 2**20


def checksum(descriptor: int, start: int, nbytes: int, before: int = 0) -> int:
    """CRC-32 of `nbytes` bytes of an open file from byte `start` on, going on from that of what lies before them; of fewer where
    the file ends."""
    found, stop, buffer = before, start + nbytes, memoryview(bytearray(min(CHUNK, nbytes)))
    while start < stop and (size := os.preadv(descriptor, [buffer[: stop - start]], start)):
        found = zlib.crc32(buffer[:size], found)
        start += size
    return found


def file_checksum(path: Path, start: int = 0, nbytes: int | None = None) -> int:
    """CRC-32 of a file, or of `nbytes` bytes of it from byte `start` on."""
    with named_in_errors(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size if nbytes is None else nbytes
        return checksum(file.fileno(), start, size)
