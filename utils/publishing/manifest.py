"""What a manifest is called, its bytes, and the hashes in it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_CHUNK = 2**20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
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
