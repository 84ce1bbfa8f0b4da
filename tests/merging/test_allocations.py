"""Bytes alive while code runs, against what torch's own allocator saw.

python -m pytest tests/merging/test_allocations.py
"""

import itertools

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors

from utils.merging.allocations import LiveBytes

SIDE = 256
METHODS = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "model_stock": {},
    "nuslerp": {"weight": 0.5},
    "karcher": {},
    "multislerp": {"weight": 0.5},
    "nearswap": {"t": 0.5},
}


def inputs(method, dtype):
    count = 2 if method in ("slerp", "nearswap") else 3
    torch.manual_seed(0)
    common = torch.randn(SIDE, SIDE)
    return [(common + 0.1 * torch.randn(SIDE, SIDE)).to(dtype) for _ in range(count)]


def seen_by_torch(work):
    """The most bytes that torch's allocator held more than before."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        work()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_it_counts_what_torch_allocates(method, dtype):
    tensors = inputs(method, dtype)

    def merge():
        merge_tensors(tensors, method, parameters=METHODS[method], base_index=0)

    seen = seen_by_torch(merge)
    with LiveBytes(tensors) as counted, torch.no_grad():
        merge()
    late = (len(tensors) - 1) * tensors[0].nbytes  # the changes' place, which is taken before it is filled
    assert seen - late - 4096 <= counted.peak <= seen + 4096
    assert counted.live < 4096, "all is let go of"


def test_memory_counts_once_it_is_written():
    given = torch.zeros(1000)
    with LiveBytes([given]) as counted:
        place = given.new_empty((2, 1000))
        assert counted.peak == 0
        place[0] = given
        assert counted.peak == 4000
        place.fill_(1)
        given.add_(1)
        assert counted.peak == counted.live == 8000
        view = place.view(-1)
        del place
        assert counted.live == 8000
        del view
        assert counted.live == 0


def test_sorting_a_whole_tensor_takes_more_than_its_result():
    given = torch.randn(1000)
    with LiveBytes([given]) as counted:
        given.sort()
    assert counted.peak == 1000 * (4 + 8 + 8)
    with LiveBytes([given]) as counted:
        given.view(10, 100).sort(dim=1)
    assert counted.peak == 1000 * (4 + 8)
