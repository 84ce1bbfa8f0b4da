"""Pieces of tensors in files, wherever they lie."""

import json
import struct
from pathlib import Path

import pytest
import torch

from tests.refusals import refused
from utils.models.headers import TensorHeader
from utils.models.tensor_files import TensorFiles


@pytest.fixture
def stored(tmp_path) -> tuple[TensorHeader, torch.Tensor]:
    """A tensor that begins at an odd offset, as older writers left them."""
    values = torch.arange(1000, dtype=torch.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    header += b" " * (1 - len(header) % 2)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    start = 8 + len(header)
    assert start % 2
    return TensorHeader("x", "F32", (1000,), path, start, 4000), values


def test_every_piece_is_right(stored):
    header, values = stored
    with TensorFiles([header.file]) as files:
        files.read_ahead(header)
        for start, stop in ((0, 1000), (0, 1), (999, 1000), (137, 641)):
            assert torch.equal(files.read(header, start, torch.empty(stop - start)), values[start:stop])


def test_a_file_that_ends_too_early(stored):
    header, _ = stored
    with TensorFiles([header.file]) as files, refused("weights-changed"):
        files.read(header, 500, torch.empty(501))


def test_a_file_that_is_gone():
    with refused("weights-unreadable"), TensorFiles([Path("nowhere.safetensors")]):
        pass
