"""What a manifest is called, its bytes, and the hashes in it."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

MANIFEST = "manifest.json"
_CHUNK = 2**20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hexadecimal.

    Raises:
        UserError: it is a pipe or a device, whose end might never come.
        OSError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is not a regular file; put a copy of the file there", "file-not-regular")
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def content_sha256(content: bytes) -> str:
    """SHA-256 of bytes, as lower-case hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return content_sha256(json.dumps(data, sort_keys=True, default=str).encode())


def with_manifest(files: Mapping[str, bytes | Path], manifest: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """The files of a folder by name, then its manifest, which gains their hashes as `files`."""
    hashes = {
        name: file_sha256(content) if isinstance(content, Path) else content_sha256(content)
        for name, content in files.items()
    }
    return {**files, MANIFEST: to_json({**manifest, "files": hashes})}


def to_json(data: Mapping[str, Any]) -> bytes:
    """Serialize a manifest: stable order, two-space indent, trailing newline; NaN and infinity are refused."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
