"""utils/selection.py against an oracle that sorts: numpy's lexsort by (magnitude, index), in float64."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from utils import magnitudes, selection
from utils.selection import band_mask, smallest_per_row_mask, top_k_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["float32", "bfloat16", "float16"]
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-40, -1e-40, 6e-8, -6e-8, 1e38, 65504.0, -65504.0]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["counting", "bits", pytest.param("cuda", marks=needs_cuda)])
def place(request, monkeypatch):
    """Each way a threshold is found, as a function that puts a tensor where that way is taken.

    "bits" runs the path of other devices on the CPU, so that it is tested on machines without a GPU.
    """
    if request.param == "bits":
        monkeypatch.setattr(selection, "counts_patterns", lambda device: False)
    return (lambda x: x.cuda()) if request.param == "cuda" else (lambda x: x)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(magnitudes, "CHUNK_ENTRIES", {"cpu": 7, "default": 7})


def top_k_oracle(x: torch.Tensor, k: int) -> torch.Tensor:
    """NaN first, then by falling magnitude, then by index."""
    magnitudes = x.detach().cpu().double().abs().reshape(-1).numpy()
    order = np.lexsort(
        (np.arange(magnitudes.size), -np.nan_to_num(magnitudes, nan=-1.0, posinf=np.inf), ~np.isnan(magnitudes))
    )
    mask = np.zeros(magnitudes.size, dtype=bool)
    mask[order[: max(k, 0)]] = True
    return torch.from_numpy(mask).reshape(x.shape)


def smallest_oracle(metric: torch.Tensor, k: int) -> torch.Tensor:
    indices = torch.sort(metric.cpu(), dim=1, stable=True).indices[:, : max(k, 0)]
    return torch.zeros(metric.shape, dtype=torch.bool).scatter_(1, indices, True)


def assert_mask(mask: torch.Tensor, expected: torch.Tensor, like: torch.Tensor) -> None:
    assert mask.dtype == torch.bool and mask.device == like.device and mask.shape == like.shape and mask.is_contiguous()
    assert torch.equal(mask.cpu(), expected)


def values(dtype: torch.dtype, *, with_nan: bool = True):
    """Lists that tie often: few distinct values, signed zeros, subnormals, infinities and, if wanted, NaN."""
    special = [*SPECIAL, float("nan"), float("-nan")] if with_nan else SPECIAL
    entries = st.one_of(st.sampled_from(special), st.integers(-3, 3).map(float), st.floats(-100, 100, width=32))
    return st.lists(entries, max_size=40).map(lambda numbers: torch.tensor(numbers, dtype=torch.float64).to(dtype))


# --- the k largest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_top_k_equals_a_sort_with_ties_and_special_values(dtype, place, small_chunks):
    @settings(max_examples=60, deadline=None)
    @given(x=values(dtype), k=st.integers(-2, 45))
    def check(x, k):
        x = place(x)
        assert_mask(top_k_mask(x, k), top_k_oracle(x, k), x)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_top_k_of_any_bit_pattern(dtype, place, small_chunks):
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integer)

    @settings(max_examples=60, deadline=None)
    @given(bits=st.lists(st.integers(limits.min, limits.max), min_size=1, max_size=30), data=st.data())
    def check(bits, data):
        x = place(torch.tensor(bits, dtype=integer).view(dtype))
        k = data.draw(st.integers(0, len(bits)))
        assert_mask(top_k_mask(x, k), top_k_oracle(x, k), x)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_band_is_the_difference_of_two_top_k(dtype, place, small_chunks):
    @settings(max_examples=40, deadline=None)
    @given(x=values(dtype), skip=st.integers(-3, 45), k=st.integers(-3, 45))
    def check(x, skip, k):
        x = place(x)
        expected = top_k_oracle(x, skip + k) & ~top_k_oracle(x, skip)
        assert_mask(band_mask(x, skip, k), expected, x)
        assert torch.equal(band_mask(x, skip, k), top_k_mask(x, skip + k) & ~top_k_mask(x, skip))

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("value", [0.0, -2.5, float("inf"), float("nan")])
def test_of_equal_entries_the_first_in_memory_are_taken(dtype, value, place, small_chunks):
    x = place(torch.full((4, 8), value, dtype=dtype))
    expected = (torch.arange(32) < 13).reshape(4, 8)
    assert_mask(top_k_mask(x, 13), expected, x)


@pytest.mark.parametrize(
    ("skip", "k", "expected"),
    [
        (2, 2, [3, 2]),
        (2, -1, []),
        (3, -3, []),
        (-1, 2, [5]),
        (0, 0, []),
        (4, 9, [1]),
        (9, 1, []),
        (0, 5, [5, 4, 3, 2, 1]),
    ],
)
def test_band_at_the_edges(skip, k, expected, place):
    x = place(torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0]))
    assert x[band_mask(x, skip, k)].abs().tolist() == expected


def test_signs_of_zero_tie(place):
    x = place(torch.tensor([-0.0, 0.0, -0.0, 0.0]))
    assert top_k_mask(x, 2).tolist() == [True, True, False, False]


def test_nan_counts_as_larger_than_infinity(place):
    x = place(torch.tensor([float("inf"), 1.0, float("nan"), -float("nan"), float("-inf")]))
    assert top_k_mask(x, 1).tolist() == [False, False, True, False, False]
    assert top_k_mask(x, 2).tolist() == [False, False, True, True, False]
    assert top_k_mask(x, 3).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)])
def test_any_shape(shape, place, small_chunks):
    x = place(torch.randn(shape))
    for k in (-1, 0, 1, x.numel() // 2, x.numel() - 1, x.numel(), x.numel() + 1):
        assert_mask(top_k_mask(x, k), top_k_oracle(x, k), x)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1::3],
        lambda x: x[:, 0],
        lambda x: x.flatten()[1:],
        lambda x: x[:1].expand(4, x.shape[1]),
        lambda x: x.view(4, 3, 10).permute(2, 0, 1),
        lambda x: x.view(1, 12, 10).transpose(1, 2),
    ],
    ids=["transposed", "columns", "rows", "one column", "odd offset", "expanded", "permuted", "batch of one"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_strides_do_not_matter(view, dtype, place, small_chunks):
    torch.manual_seed(0)
    x = view(place(torch.randn(12, 10).mul(4).round().to(dtype)))
    for k in (1, 11, x.numel() - 1):
        assert_mask(top_k_mask(x, k), top_k_oracle(x, k), x)


def test_the_input_is_left_alone_and_may_need_gradients(place):
    x = place(torch.randn(50)).requires_grad_()
    before = x.detach().clone()
    mask = top_k_mask(x, 20)
    assert torch.equal(x.detach(), before) and not mask.requires_grad
    assert not smallest_per_row_mask(x.view(5, 10), 3).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_three_million_entries(dtype, zeros, place):
    """Several chunks of the real size; bfloat16 ties in the thousands at any threshold."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1500, 2000, generator=generator).mul_(0.01)
    x = place(x.masked_fill_(torch.rand(x.shape, generator=generator) < zeros, 0).to(dtype))
    k = x.numel() // 3 if not zeros else x.numel() // 2  # the second threshold is zero itself
    assert_mask(top_k_mask(x, k), top_k_oracle(x, k), x)


def test_a_result_does_not_depend_on_the_chunk_size(monkeypatch, place):
    x = place(torch.randn(1000).mul(3).round().bfloat16())
    whole = top_k_mask(x, 333)
    for entries in (1, 64, 999, 1000):
        monkeypatch.setattr(magnitudes, "CHUNK_ENTRIES", {"default": entries})
        assert torch.equal(top_k_mask(x, 333), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        top_k_mask(torch.zeros(3).to(dtype), 1)
    with pytest.raises(TypeError, match="selection is for float32, bfloat16, float16"):
        smallest_per_row_mask(torch.zeros(3, 3).to(dtype), 1)


# --- the k smallest of each row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_smallest_per_row_equals_a_stable_sort(dtype, place, small_chunks):
    @settings(max_examples=60, deadline=None)
    @given(entries=values(dtype), columns=st.integers(1, 12), k=st.integers(-1, 13))
    def check(entries, columns, k):
        rows = entries.numel() // columns
        metric = place(entries[: rows * columns].view(rows, columns).abs())
        assert_mask(smallest_per_row_mask(metric, k), smallest_oracle(metric, k), metric)

    check()


def test_smallest_per_row_treats_the_signs_of_zero_alike(place):
    metric = place(torch.tensor([[0.0, -0.0, 0.0, 1.0], [-0.0, 1.0, 0.0, -0.0]]))
    expected = torch.tensor([[True, True, False, False], [True, False, True, False]])
    assert_mask(smallest_per_row_mask(metric, 2), expected, metric)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (1, 1), (3, 1), (1, 9)])
def test_smallest_per_row_of_any_size(shape, place):
    metric = place(torch.rand(shape))
    for k in (-1, 0, 1, shape[1] - 1, shape[1], shape[1] + 1):
        assert_mask(smallest_per_row_mask(metric, k), smallest_oracle(metric, k), metric)


def test_smallest_per_row_of_a_transposed_metric(place, small_chunks):
    metric = place(torch.rand(13, 9).mul(8).round().t())
    assert_mask(smallest_per_row_mask(metric, 6), smallest_oracle(metric, 6), metric)


@pytest.mark.parametrize("distinct", [None, 50])
def test_smallest_per_row_of_a_wanda_metric(distinct, place):
    """A real size, in several chunks; with `distinct` values, every row has ties at its threshold."""
    generator = torch.Generator().manual_seed(2)
    metric = torch.randn(1500, 600, generator=generator).abs() * torch.rand(600, generator=generator)
    if distinct:
        metric = (metric * distinct / 4).round()
    metric = place(metric)
    assert_mask(smallest_per_row_mask(metric, 300), smallest_oracle(metric, 300), metric)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_a_metric_has_two_dimensions(shape):
    with pytest.raises(ValueError, match=f"not {len(shape)}"):
        smallest_per_row_mask(torch.zeros(shape), 1)


# --- memory and waiting ---------------------------------------------------------------------------------------------------


def allocations(work) -> tuple[int, int]:
    """The largest single allocation and the peak of all of them together, in bytes, on the CPU while `work` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(sizes), int(np.cumsum(sizes).max())


def test_the_probe_for_allocations_sees_what_a_sort_takes():
    x = torch.randn(2_000_000)
    largest, peak = allocations(lambda: torch.argsort(x))
    assert largest >= 8 * x.numel() and peak >= 8 * x.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("strided", [False, True])
def test_temporaries_are_bounded_by_the_chunk(dtype, strided):
    x = torch.randn(4000, 1500).to(dtype)
    x = x.t() if strided else x
    chunk = magnitudes.CHUNK_ENTRIES["cpu"]
    largest, peak = allocations(lambda: band_mask(x, x.numel() // 100, x.numel() // 3))
    assert largest == x.numel(), "the mask, one byte an entry, is the only allocation of the tensor's size"
    assert peak - x.numel() <= 16 * chunk + 3 * 65536 * 8


def test_temporaries_of_rows_are_bounded_by_the_chunk():
    metric = torch.rand(3000, 2000)
    chunk = magnitudes.CHUNK_ENTRIES["cpu"]
    largest, peak = allocations(lambda: smallest_per_row_mask(metric, 1000))
    assert largest == metric.numel()
    assert peak - metric.numel() <= 16 * chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("rows", [False, True])
def test_the_search_over_bits_needs_4_bytes_an_entry_at_most(dtype, rows, monkeypatch):
    """One chunk, in the way of other devices: the sum of a mask must not make an int64 copy of it."""
    monkeypatch.setattr(selection, "counts_patterns", lambda device: False)
    x = torch.rand(512, magnitudes.CHUNK_ENTRIES["cpu"] // 512).to(dtype)
    work = (lambda: smallest_per_row_mask(x, 100)) if rows else (lambda: band_mask(x, 1000, 50_000))
    largest, _ = allocations(work)
    assert largest <= 4 * x.numel()


@pytest.mark.parametrize("fails", [False, True])
def test_on_the_cpu_one_thread_of_torchs_selects_and_the_setting_is_put_back(fails):
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.gt.Scalar:  # of patterns with the threshold
                seen.append(torch.get_num_threads())
                if fails:
                    raise MemoryError
            return function(*args, **(kwargs or {}))

    before, x = torch.get_num_threads(), torch.randn(50)
    torch.set_num_threads(3)
    try:
        with pytest.raises(MemoryError) if fails else contextlib.nullcontext(), Watching():
            band_mask(x, 3, 20)
        assert torch.get_num_threads() == 3 and set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_selecting_in_several_threads_leaves_their_setting(monkeypatch):
    inputs = [torch.randn(3000, generator=torch.Generator().manual_seed(seed)) for seed in range(24)]
    monkeypatch.setattr(magnitudes, "CHUNK_ENTRIES", {"cpu": 64, "default": 64})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            masks = list(pool.map(lambda x: top_k_mask(x, 1000), inputs))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for x, mask in zip(inputs, masks, strict=True):
        assert_mask(mask, top_k_oracle(x, 1000), x)


def test_the_default_device_does_not_matter():
    """mergekit's executor for several GPUs sets one in its threads."""
    x = torch.randn(50)
    with torch.device("meta"):
        mask = top_k_mask(x, 20)
    assert_mask(mask, top_k_oracle(x, 20), x)


@needs_cuda
def test_nothing_waits_for_the_gpu():
    x = torch.randn(3000, 1000, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        band_mask(x, 30_000, 1_000_000)
        top_k_mask(x.bfloat16().t(), 1_000_000)
        smallest_per_row_mask(x.abs(), 500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
