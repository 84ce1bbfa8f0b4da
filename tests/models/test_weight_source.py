"""Weights on their way to a device, asked for by several threads.

python -m pytest tests/models/test_weight_source.py
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from tests.refusals import refused
from tests.tiny_checkpoints import save_tiny
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import StoredLayout
from utils.models.weight_source import StreamedWeights

THREADS = 4


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    return open_checkpoint(str(save_tiny("llama", tmp_path_factory.mktemp("model")))).tensors


def fetch_at_once(weights: StreamedWeights) -> list[dict]:
    together = threading.Barrier(THREADS)

    def fetch(name: str) -> dict:
        together.wait(timeout=30)
        return weights.fetch([name])

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(fetch, list(weights.layout.direct)[:THREADS]))


def test_threads_that_ask_at_once_share_one_ring_of_buffers(headers, monkeypatch):
    made = []

    class Copies:
        """A ring that takes a while to make, as pinning memory does."""

        def __init__(self, files, device):
            made.append(device)
            time.sleep(0.05)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def fetch(self, stored, dtype, user):
            return dict.fromkeys(stored)

    monkeypatch.setattr("utils.models.weight_source.PinnedCopies", Copies)
    found = fetch_at_once(StreamedWeights(StoredLayout(headers, (), (), ()), torch.device("meta"), torch.float32))
    assert [name for each in found for name in each] == list(headers)[:THREADS]
    assert made == [torch.device("meta")]


def test_threads_that_ask_at_once_on_the_cpu_read_the_same_file(headers):
    weights = StreamedWeights(StoredLayout(headers, (), (), ()), torch.device("cpu"), torch.float32)
    alone = StreamedWeights(StoredLayout(headers, (), (), ()), torch.device("cpu"), torch.float32)
    for found in fetch_at_once(weights):
        for name, tensor in found.items():
            assert torch.equal(tensor, alone.fetch([name])[name])
    weights.close()
    alone.close()


def test_a_file_that_shrinks_while_it_is_measured_is_an_error_not_a_crash(tmp_path):
    tensors = open_checkpoint(str(save_tiny("llama", tmp_path / "model"))).tensors
    weights = StreamedWeights(StoredLayout(tensors, (), (), ()), torch.device("cpu"), torch.bfloat16)
    names = list(tensors)
    weights.fetch(names[:1])
    os.truncate(tensors[names[0]].file, tensors[names[0]].start)
    with refused("weights-changed"):
        weights.fetch(names)
    weights.close()


def test_values_are_those_of_the_safetensors_library(headers):
    weights = StreamedWeights(StoredLayout(headers, (), (), ()), torch.device("cpu"), torch.bfloat16)
    stored = load_file(next(iter(headers.values())).file)
    found = weights.fetch(list(headers))
    assert set(found) == set(stored) and all(torch.equal(found[name], stored[name]) for name in stored)
    weights.close()
