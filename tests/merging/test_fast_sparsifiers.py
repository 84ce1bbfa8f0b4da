"""Selection without sorting inside mergekit's executor, against mergekit's own sparsifiers and a stable sort."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit import merge_methods, sparsify
from mergekit.graph import Executor
from mergekit.sparsify import RescaleNorm, SparsificationMethod
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import poison
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, recipe
from utils import magnitudes, selection
from utils.magnitudes import pattern_of
from utils.merging import planning
from utils.merging import run as merge_run
from utils.merging.fast_sparsifiers import selecting_exactly
from utils.merging.pieces import choice

STOCK = (sparsify.magnitude, sparsify.magnitude_outliers)
METHODS = ["ties", "breadcrumbs", "breadcrumbs_ties"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["float32", "bfloat16", "float16"]
COUNTING = "; mergekit's executor selects by counting, without sorting"
PIECES = "merging in pieces is for the CPU"

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def in_place() -> tuple:
    """mergekit's functions as they are at this moment."""
    return sparsify.magnitude, sparsify.magnitude_outliers


@pytest.fixture(autouse=True)
def _mergekit_is_as_before():
    assert in_place() == STOCK
    yield
    assert in_place() == STOCK


@pytest.fixture(params=["cpu", "search over bits", pytest.param("cuda", marks=needs_cuda)])
def place(request, monkeypatch):
    """Each way of selecting, as a function that puts a tensor where that way is taken."""
    monkeypatch.setattr(magnitudes, "CHUNK_ENTRIES", {"cpu": 29, "default": 29})
    if request.param == "search over bits":
        monkeypatch.setattr(selection, "counts_patterns", lambda device: False)
    return (lambda x: x.cuda()) if request.param == "cuda" else (lambda x: x)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(pattern_of(x.dtype).integer)


def distinct(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Finite numbers of which no two have one magnitude; subnormals, zero and the largest numbers among them."""
    kind, generator = pattern_of(dtype), torch.Generator().manual_seed(seed)
    stride = kind.infinity // count
    patterns = torch.randperm(count, generator=generator) * stride + int(
        torch.randint(0, stride, (), generator=generator)
    )
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return patterns.to(kind.integer).view(dtype) * signs.to(dtype)


SELECTIONS = st.fixed_dictionaries(
    {
        "method": st.sampled_from([SparsificationMethod.magnitude, SparsificationMethod.magnitude_outliers]),
        "density": st.one_of(st.sampled_from([-0.5, 0.0, 1e-9, 0.5, 0.999999, 1.0, 1.5]), st.floats(0, 1)),
        "gamma": st.one_of(st.sampled_from([-0.2, 0.0, 0.01, 0.5, 1.0, 1.7]), st.floats(0, 1)),
    }
)
NORMS = st.sampled_from([None, *RescaleNorm])
SHAPES = st.sampled_from([(1,), (2,), (3, 5), (40, 7), (2, 6, 11), (233,)])


# --- the sparsifiers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_bits_equal_mergekits_where_nothing_ties(dtype, place):
    @settings(max_examples=50)
    @given(shape=SHAPES, selected=SELECTIONS, norm=NORMS, seed=st.integers(0, 2**31), transposed=st.booleans())
    def check(shape, selected, norm, seed, transposed):
        x = place(distinct(torch.Size(shape).numel(), dtype, seed).view(shape))
        x = x.transpose(0, -1) if transposed else x
        before = bits(x)
        stock = sparsify.sparsify(x, rescale_norm=norm, **selected)
        with selecting_exactly():
            ours = sparsify.sparsify(x, rescale_norm=norm, **selected)
        assert ours.dtype == stock.dtype and ours.shape == stock.shape and ours.stride() == stock.stride()
        assert ours.device == stock.device and torch.equal(bits(ours), bits(stock))
        assert torch.equal(bits(x), before)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_of_magnitudes_that_tie_the_first_are_kept_and_exactly_as_many_as_asked_for(dtype, place):
    @settings(max_examples=50)
    @given(
        entries=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]), min_size=1, max_size=150),
        selected=SELECTIONS.filter(lambda one: 0 <= one["density"] < 1 and one["gamma"] >= 0),
    )
    def check(entries, selected):
        x = torch.tensor(entries, dtype=dtype)
        count, keep, skip = len(entries), int(selected["density"] * len(entries)), 0
        if selected["method"] == SparsificationMethod.magnitude_outliers:
            skip = min(count - keep, int(selected["gamma"] * count))
        elif selected["density"] > 0:
            keep = max(1, keep)
        order = x.double().abs().sort(descending=True, stable=True).indices[skip : skip + keep]
        expected = torch.zeros_like(x)
        expected[order] = x[order]
        with selecting_exactly():
            ours = sparsify.sparsify(place(x), **selected).cpu()
        assert torch.equal(ours, expected) and int(ours.count_nonzero()) == keep

    check()


@pytest.mark.parametrize("method", [SparsificationMethod.magnitude, SparsificationMethod.magnitude_outliers])
@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(3, 0), torch.arange(9.0, dtype=torch.float64)])
def test_what_cannot_be_ranked_here_is_mergekits(method, x):
    stock = sparsify.sparsify(x, 0.5, method)
    with selecting_exactly():
        ours = sparsify.sparsify(x, 0.5, method)
    assert ours.dtype == stock.dtype and torch.equal(ours, stock)


def test_nan_counts_as_largest_as_in_mergekit():
    x = torch.tensor([1.0, float("nan"), -3.0, 2.0])
    with selecting_exactly():
        assert sparsify.magnitude(x, 0.5).isnan().tolist() == [False, True, False, False]
        assert sparsify.magnitude(x, 0.5)[2] == -3


@pytest.mark.parametrize("method", [SparsificationMethod.random, SparsificationMethod.della_magprune])
def test_methods_that_draw_are_left_alone(method):
    x, results = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)), []
    for active in (False, True):
        with selecting_exactly(active):
            torch.manual_seed(7)
            results.append(sparsify.sparsify(x, 0.5, method, epsilon=0.1, rescale_norm=RescaleNorm.l1))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", [SparsificationMethod.magnitude, SparsificationMethod.magnitude_outliers])
def test_nothing_of_the_tensors_size_is_made_but_masks_and_results(method):
    x = torch.randn(2000, 1500).bfloat16()
    largest = []
    for active in (False, True):
        with (
            selecting_exactly(active),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            sparsify.sparsify(x, 0.4, method, gamma=0.01)
        events = profile.profiler.kineto_results.events()
        largest.append(max(event.nbytes() for event in events if event.name() == "[memory]"))
    assert largest[0] >= 8 * x.numel(), "the probe sees what mergekit's sort takes"
    assert largest[1] <= 2 * x.numel()


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_on_a_gpu_nothing_waits_and_the_bits_are_those_of_the_cpu(dtype):
    x = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    with selecting_exactly():
        expected = sparsify.magnitude(x, 0.3), sparsify.magnitude_outliers(x, 0.3, gamma=0.02)
        on_gpu = x.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = sparsify.magnitude(on_gpu, 0.3), sparsify.magnitude_outliers(on_gpu, 0.3, gamma=0.02)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(bits(ours), bits(cpu)) for ours, cpu in zip(found, expected, strict=True))


# --- the context ------------------------------------------------------------------------------------------------------


def test_functions_are_replaced_within_the_context_only():
    with selecting_exactly(False):
        assert in_place() == STOCK
    with selecting_exactly():
        replaced = in_place()
        assert not set(replaced) & set(STOCK)
        with selecting_exactly():
            assert in_place() == replaced
        assert in_place() == replaced
    assert in_place() == STOCK


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_functions_are_put_back_after_a_failure(error):
    with pytest.raises(error), selecting_exactly(), selecting_exactly():
        raise error
    assert in_place() == STOCK


def test_contexts_that_overlap_in_several_threads():
    """One begins first and ends first: the other's functions must stay."""
    second_began, first_ended, seen = threading.Event(), threading.Event(), []

    def second():
        with selecting_exactly():
            second_began.set()
            assert first_ended.wait(10)
            seen.append(in_place())

    thread = threading.Thread(target=second)
    with selecting_exactly():
        thread.start()
        assert second_began.wait(10)
    first_ended.set()
    thread.join()
    assert seen and not set(seen[0]) & set(STOCK)
    assert in_place() == STOCK


def test_threads_started_within_select_exactly_on_any_default_device():
    """As the workers of mergekit's executor for several GPUs, each with a default device of its own."""
    inputs = [torch.randn(70, 80, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [sparsify.magnitude(x, 0.3) for x in inputs]

    def work(x):
        with torch.device("meta"):
            return sparsify.magnitude(x, 0.3)

    with selecting_exactly(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, inputs))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# --- whole merges -----------------------------------------------------------------------------------------------------


@pytest.fixture
def by_executor(monkeypatch) -> list:
    """Merges in pieces are switched off, as on a GPU; the list fills with mergekit's functions while it merges."""
    leave_all_to_mergekit(monkeypatch)
    return watch_executor(monkeypatch)


def leave_all_to_mergekit(monkeypatch) -> None:
    def divide(plan, settings):
        return replace(choice.divide(plan, settings), direct=(), left=tuple((one, PIECES) for one in plan.tensors))

    monkeypatch.setattr(planning, "divide", divide)


def watch_executor(monkeypatch) -> list:
    """A list that fills with mergekit's functions as they are when its executor runs."""
    seen = []

    class Watched(Executor):
        def run(self, *given, **named):
            seen.append(in_place())
            return super().run(*given, **named)

    monkeypatch.setattr(merge_run, "Executor", Watched)
    return seen


def path_line(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("path: "))
    return line.removesuffix("; after a kill the merge begins anew")


@pytest.mark.parametrize(
    ("method", "rescale"),
    few(
        itertools.product(METHODS, (False, True)), *((method, bool(place % 2)) for place, method in enumerate(METHODS))
    ),
)
def test_merges_by_the_executor_equal_stock_mergekits(copies, by_executor, method, rescale, capsys, monkeypatch):
    data = recipe(copies, method, parameters={"rescale": rescale})
    stock = merge_stock(copies, data)
    sorts = []
    for name in ("argsort", "sort"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _f=original, **keys: sorts.append(1) or _f(*args, **keys))
    assert_same_tensors(merge_here(copies, data, quiet=False), stock)
    assert path_line(capsys.readouterr().out) == f"path: all tensors by mergekit: {PIECES}{COUNTING}"
    (seen,) = by_executor
    assert not set(seen) & set(STOCK) and not sorts
    merge_here(copies, data, "slow", fast_selection=False)
    assert by_executor[1] == STOCK and sorts
    assert_same_tensors(copies / "slow", stock)


@pytest.mark.parametrize("method", METHODS)
def test_where_changes_tie_the_executor_and_the_merge_in_pieces_agree(copies, method, monkeypatch):
    for name in ("base", "code", "math"):
        file = copies / name / "model.safetensors"
        coarse = {key: (value.float() * 64).round() / 64 for key, value in load_file(file).items()}
        save_file({key: value.bfloat16() for key, value in coarse.items()}, file, metadata={"format": "pt"})
    data = recipe(copies, method, dtype="float32")
    in_pieces = merge_here(copies, data)
    with monkeypatch.context() as patch:
        leave_all_to_mergekit(patch)
        by_executor = merge_here(copies, data, "executor")
    assert_same_tensors(by_executor, in_pieces)


def test_tensors_left_to_mergekit_are_selected_by_counting(copies, capsys, monkeypatch):
    """A recipe of which some tensors are merged in pieces and some are not."""
    data = recipe(copies, parameters={"rescale": True})
    for model in data["models"][1:]:
        model["parameters"]["density"][-1]["value"] = 1
    stock = merge_stock(copies, data)
    monkeypatch.setattr(torch, "argsort", lambda *args, **keys: pytest.fail("sorted"))
    assert_same_tensors(merge_here(copies, data, quiet=False), stock)
    line = path_line(capsys.readouterr().out)
    assert line.endswith(f"; 3 by mergekit (rescale: true takes norms of whole tensors){COUNTING}")


def test_where_nothing_is_cut_nothing_is_said(copies, by_executor, capsys):
    data = recipe(copies)
    for model in data["models"][1:]:
        model["parameters"]["density"] = 1.0
    merge_here(copies, data, quiet=False)
    assert path_line(capsys.readouterr().out) == f"path: all tensors by mergekit: {PIECES}"


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "della", "linear"])
def test_other_methods_replace_nothing(copies, by_executor, method):
    data = recipe(copies, method)
    assert_same_tensors(merge_here(copies, data, random_seed=3), merge_stock(copies, data, seed=3))
    assert by_executor == [STOCK]


def test_unknown_code_is_not_replaced_and_the_output_says_so(copies, monkeypatch, capsys):
    seen = watch_executor(monkeypatch)
    monkeypatch.setattr(choice, "replaced_code", lambda: "0123456789abcdef")
    data = recipe(copies)
    assert_same_tensors(merge_here(copies, data, quiet=False), merge_stock(copies, data))
    reason = "this mergekit computes ties by other code than the one compared with (0123456789ab)"
    assert path_line(capsys.readouterr().out) == f"path: all tensors by mergekit: {reason}"
    assert seen == [STOCK]


@pytest.mark.parametrize("code", ["known", "unknown"])
def test_the_reason_on_a_gpu(code, monkeypatch):
    """An unknown mergekit is the reason that counts: it keeps both ways from being taken."""
    from types import SimpleNamespace

    if code == "unknown":
        monkeypatch.setattr(choice, "replaced_code", lambda: "0123456789abcdef")
    plan = SimpleNamespace(options=SimpleNamespace(device="cuda:0"), method=merge_methods.get("ties"), tensors=["x"])
    ((_, reason),) = choice.divide(plan, SimpleNamespace(fast_selection=True, multi_gpu=False)).left
    assert (reason == PIECES) == (code == "known")
    assert code == "known" or "other code than the one compared with" in reason


def test_mergekits_functions_are_back_after_a_merge_that_fails(copies, by_executor):
    poison(copies / "math", "model.norm.weight", float("inf"))
    with refused("merge-not-finite"):
        merge_here(copies, recipe(copies))
    assert by_executor and not set(by_executor[0]) & set(STOCK)
    assert in_place() == STOCK


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keys", [{}, {"low_cpu_memory": True}, {"multi_gpu": True}], ids=["", "low", "multi"])
def test_merges_on_a_gpu_equal_stock_mergekits_there(copies, method, keys, capsys):
    data = recipe(copies, method)
    stock = merge_stock(copies, data, device="cuda")
    device = "cuda" if keys else "cuda:0"
    assert_same_tensors(merge_here(copies, data, quiet=False, device=device, **keys), stock)
    assert path_line(capsys.readouterr().out) == f"path: all tensors by mergekit: {PIECES}{COUNTING}"


def test_only_these_methods_rank_by_magnitude():
    """A new method of mergekit's that does should be looked at."""
    kinds = (SparsificationMethod.magnitude, SparsificationMethod.magnitude_outliers)
    registered = merge_methods.registered_methods()
    assert [one.spec.name for one in registered if getattr(one, "sparsification_method", None) in kinds] == METHODS
