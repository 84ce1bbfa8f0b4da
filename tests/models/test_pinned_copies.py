"""Tensors brought to a device through a ring of buffers, against safetensors' own reading."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from utils.models import pinned_copies
from utils.models.headers import read_headers
from utils.models.pinned_copies import PinnedCopies

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda", 0), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Buffers that hold a small part of most tensors, and fewer of them than a tensor needs."""
    monkeypatch.setattr(pinned_copies, "SLOT_BYTES", 100)
    monkeypatch.setattr(pinned_copies, "SLOTS", 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of every dtype, in shapes from a single number to many buffers, some of them empty."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in [*FLOATS, *INTEGERS]:
        for shape in [(), (1,), (50,), (7, 33), (3, 0), (2, 5, 40)]:
            values = torch.randint(-100, 100, shape, generator=generator)
            tensors[f"{dtype}-{shape}"] = (values / 8 if dtype.is_floating_point else values).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def user_of(device: torch.device):
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype_and_shape_arrives_and_floats_are_converted(folder, device, dtype):
    headers = read_headers(folder, "m")
    with PinnedCopies({folder / "model.safetensors"}, device) as copies:
        found = copies.fetch(headers, dtype, user_of(device))
    for name, stored in load_file(folder / "model.safetensors").items():
        assert found[name].device == device
        assert_equal(found[name], stored.to(dtype) if stored.is_floating_point() else stored)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_later_calls_reuse_the_buffers_and_leave_earlier_tensors_alone(folder, device):
    headers, stored = read_headers(folder, "m"), load_file(folder / "model.safetensors")
    with PinnedCopies({folder / "model.safetensors"}, device) as copies:
        found = {}
        for name in headers:
            found |= copies.fetch({name: headers[name]}, stored[name].dtype, user_of(device))
    for name, value in found.items():
        assert_equal(value, stored[name])


def test_names_asked_for_need_not_be_the_names_in_the_file(folder):
    header = read_headers(folder, "m")["torch.float32-(50,)"]
    with PinnedCopies({header.file}, CPU) as copies:
        found = copies.fetch({"body.weight": header}, torch.float32, None)
    assert_equal(found["body.weight"], load_file(header.file)["torch.float32-(50,)"])


def test_calls_from_several_threads_do_not_mix(folder):
    headers, stored = read_headers(folder, "m"), load_file(folder / "model.safetensors")
    together = threading.Barrier(4)

    def fetch(name: str, copies: PinnedCopies) -> torch.Tensor:
        together.wait(timeout=30)
        return copies.fetch({name: headers[name]}, stored[name].dtype, None)[name]

    names = [f"{dtype}-(2, 5, 40)" for dtype in FLOATS]
    with PinnedCopies({folder / "model.safetensors"}, CPU) as copies, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: fetch(name, copies), names))
    for name, value in zip(names, found, strict=True):
        assert_equal(value, stored[name])


def test_a_file_that_ends_early_is_an_error_and_the_next_call_works(folder):
    file = folder / "model.safetensors"
    headers, whole = read_headers(folder, "m"), file.read_bytes()
    last = max(headers.values(), key=lambda header: header.start)
    first = min((header for header in headers.values() if header.nbytes), key=lambda header: header.start)
    with PinnedCopies({file}, CPU) as copies:
        os.truncate(file, last.start)
        with refused("weights-changed"):
            copies.fetch({last.name: last}, torch.float32, None)
        file.write_bytes(whole)
        found = copies.fetch({first.name: first}, torch.float64, None)
    assert found[first.name].shape == first.shape


def test_a_dtype_that_cannot_be_read_names_file_and_tensor(tmp_path):
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    headers = read_headers(tmp_path, "m")
    stored_as = refused("weights-dtype")
    with PinnedCopies({tmp_path / "model.safetensors"}, CPU) as copies, stored_as:
        copies.fetch(headers, torch.float32, None)
