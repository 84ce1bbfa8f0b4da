"""Inputs are asked for in the order a merge reads them, in the background, and only so much of them.

python -m pytest tests/models/test_page_cache.py
"""

import os
from pathlib import Path

import pytest

from utils.models.checkpoints import Checkpoint
from utils.models.headers import TensorHeader
from utils.models.opening import open_checkpoint
from utils.models.page_cache import first_bytes, read_ahead


def checkpoint(name: str, sizes: dict[str, int]) -> Checkpoint:
    headers, start = {}, 100
    for tensor, nbytes in sizes.items():
        headers[tensor] = TensorHeader(tensor, "BF16", (nbytes // 2,), Path(name) / "model.safetensors", start, nbytes)
        start += nbytes
    return Checkpoint(name, None, Path(name), {}, headers)


def test_the_first_bytes_are_those_of_all_models_by_tensor():
    pair = [checkpoint("a", {"z": 10, "b": 20}), checkpoint("c", {"b": 20, "z": 10})]
    asked = [[(header.file.parent.name, header.name) for header in first_bytes(pair, limit)] for limit in (39, 50, 60)]
    everything = [("a", "b"), ("c", "b"), ("a", "z"), ("c", "z")]
    assert asked == [everything[:1], everything[:3], everything]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no read-ahead hints on this system")
def test_every_byte_of_the_tensors_is_asked_for_once(tmp_path, monkeypatch):
    from tests.tiny_checkpoints import save_tiny

    save_tiny("llama", tmp_path / "model")
    model = open_checkpoint(str(tmp_path / "model"))
    asked = []
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda file, start, count, advice: asked.append((os.readlink(f"/proc/self/fd/{file}"), start, count, advice)),
    )
    thread = read_ahead([model], 2**30)
    thread.join(10)
    assert not thread.is_alive() and thread.daemon
    expected = {(str(h.file), h.start, h.nbytes, os.POSIX_FADV_WILLNEED) for h in model.tensors.values()}
    assert set(asked) == expected and len(asked) == len(expected)


def test_what_cannot_be_opened_is_no_error(tmp_path):
    thread = read_ahead([checkpoint(str(tmp_path / "gone"), {"a": 10})], 2**30)
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_a_system_without_hints_asks_for_nothing(monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert read_ahead([checkpoint("a", {"a": 10})], 2**30) is None
