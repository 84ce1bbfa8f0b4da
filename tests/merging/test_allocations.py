"""Bytes alive while code runs, against what torch's own allocator saw.

python -m pytest tests/merging/test_allocations.py
"""

import itertools
import os
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors

from utils.merging.allocations import LiveBytes

SIDE = 256
MEASURED = (
    torch.__version__.startswith("2.13.") and not torch.version.cuda
)  # where buffers inside operations were measured
# These take the place of their changes, or of their result, and fill it bit by bit: it counts as it is filled.
FILLING = ("linear", "slerp", "dare_linear", "dare_ties", "della")
DOTS = ("karcher",)
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
    "arcee_fusion": {},
}


def inputs(method, dtype):
    count = 2 if method in ("slerp", "nearswap", "arcee_fusion") else 3
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


def resident(key):
    """Bytes of this process in memory, by a key of the system's."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_it_counts_what_torch_allocates(method, dtype):
    tensors = inputs(method, dtype)

    def merge():
        merge_tensors(tensors, method, parameters=METHODS[method], base_index=0)

    seen = seen_by_torch(merge)
    with LiveBytes(tensors) as counted, torch.no_grad():
        merge()
    late = tensors[0].nbytes if method in FILLING else 0
    if method in DOTS:  # processors with matrix instructions for bfloat16 lay vectors out anew, up to 32 MiB
        late += seen_by_torch(lambda: torch.dot(*(one.flatten() for one in tensors[:2])))
    slack = 4096 if MEASURED else seen // 4  # another build may take other buffers inside operations
    assert seen - late - slack <= counted.peak <= seen + slack
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


@pytest.mark.skipif(not MEASURED, reason="buffers inside operations were measured on another build of torch")
@pytest.mark.parametrize(
    "work",
    [
        lambda given: given.sort(),
        lambda given: given.sort(stable=True),
        lambda given: given.bfloat16().sort(),
        lambda given: given.argsort(descending=True),
        lambda given: given.view(SIDE, SIDE).sort(dim=1),  # rows are sorted one by one
        lambda given: (given > 0).sum(),
        lambda given: (given > 0).view(SIDE, SIDE).sum(dim=0),
    ],
)
def test_buffers_inside_operations_are_those_of_torchs_allocator(work):
    given = torch.randn(SIDE * SIDE)
    seen = seen_by_torch(lambda: work(given))
    with LiveBytes([given]) as counted:
        work(given)
    assert counted.peak == pytest.approx(seen, rel=0.01)


@pytest.mark.skipif(
    not MEASURED or not os.access("/proc/self/clear_refs", os.W_OK), reason="another build, or no /proc"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_queue_of_topk_is_what_the_system_sees(dtype):
    """It is a vector of the C++ library's, of which torch's allocator knows nothing."""
    given = torch.randn(2**23).to(dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is there now
    before = resident("VmRSS")
    given.topk(1000)
    seen = resident("VmHWM") - before
    with LiveBytes([given]) as counted:
        given.topk(1000)
    assert counted.peak == pytest.approx(seen, rel=0.1)
