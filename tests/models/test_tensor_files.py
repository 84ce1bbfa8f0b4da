"""Pieces of tensors in files, wherever they lie."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.refusals import refused
from utils.models.headers import TensorHeader, read_headers
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


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 200_001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_another_dtype_is_that_of_the_whole(tmp_path, shape, dtype):
    """Converted in pieces: the tensor is larger than one, and no multiple."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"first": torch.ones(3), "x": values}, tmp_path / "model.safetensors")
    header = read_headers(tmp_path, "model")["x"]
    with TensorFiles([header.file]) as files:
        assert torch.equal(files.read_whole(header), values)
        found = files.read_whole(header, dtype)
    assert found.dtype == dtype and torch.equal(found, values.to(dtype))
