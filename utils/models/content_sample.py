"""Which weights a checkpoint has, told without reading it whole: a hash over a sample of its tensors' bytes.

Times of files do not tell: copies and downloads change them, and some tools keep them over other content. Training changes
nearly every number of what it trains, so that a page of each of some thousand tensors shows it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from utils.models.checkpoints import Checkpoint
from utils.models.headers import TensorHeader

_TENSORS = 1024  # at most, spread evenly over the names
_BYTES = 4096  # of each, around its middle: one page


def content_sample(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and sampled bytes of a checkpoint's tensors, those of an adapter among them.

    The same for a copy, and for the same tensors in other files; another one once weights were trained on or converted.
    Of a checkpoint with more than 1,024 tensors so many are
    sampled, spread evenly over the names; a change of the others, or of a few rows, may go unseen.
    """
    stored = (checkpoint.tower or checkpoint).stored
    headers = [stored[name] for name in sorted(stored)]
    parts = [part for header in headers for part in (header.change.headers if header.change else ())]
    digest, chosen = hashlib.sha256(), [*_spread(headers), *_spread(parts)]
    for header in (*headers, *parts):
        digest.update(f"{header.name}|{header.dtype}|{header.shape}|{header.change and header.change.scale}\n".encode())
    read = _middles(chosen)
    for header in chosen:
        digest.update(read[header.file, header.start, header.nbytes])
    return digest.hexdigest()


def _spread(headers: Sequence[TensorHeader]) -> Sequence[TensorHeader]:
    return headers[:: -(-len(headers) // _TENSORS) or 1]


def _middles(headers: Sequence[TensorHeader]) -> dict[tuple[Path, int, int], bytes]:
    """The bytes around the middle of each tensor, by its file, place there and size (one of no bytes begins where the next does); files are read from begin to end."""
    found: dict[tuple[Path, int, int], bytes] = {}
    for path in sorted({header.file for header in headers}):
        with open(path, "rb", buffering=0) as file:
            for header in sorted((one for one in headers if one.file == path), key=lambda one: one.start):
                count = min(_BYTES, header.nbytes)
                file.seek(header.start + (header.nbytes - count) // 2)
                found[path, header.start, header.nbytes] = file.read(count)
    return found
