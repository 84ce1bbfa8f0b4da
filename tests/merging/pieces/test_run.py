"""Merging in pieces against stock mergekit: equal bits where no magnitudes tie, a stated rule where they do."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.merge_methods import generalized_task_arithmetic
from mergekit.merge_methods.api import merge_tensors
from mergekit.sparsify import SparsificationMethod
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.tiny_merges import without_ties
from utils.merging.pieces import changes, tensor_cuts
from utils.merging.pieces import tensor as tensor_merge
from utils.merging.pieces.arithmetic import Average, Combination
from utils.merging.pieces.choice import DirectTensor, kept_band
from utils.merging.pieces.cuts import KnownCuts
from utils.merging.pieces.run import merge_directly
from utils.models.headers import read_headers
from utils.models.shard_files import ShardFiles, TensorSpec

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = st.sampled_from(list(BITS))
SHAPES = st.sampled_from([(1,), (2, 3), (7, 1), (33, 5), (63,), (3, 5, 7), (130, 4), (41, 29)])
METHODS = ("ties", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic", "linear")


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces and spans so short that every tensor has borders between them."""
    for module in (changes, tensor_cuts, tensor_merge):
        for name, value in (("PIECE", 24), ("SPAN", 72), ("MOST_SPANS", 9)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def merge_here(folder: Path, tensors, method, values, dtype, out_dtype, threads=2, report=None) -> torch.Tensor:
    """Merge tensors of one name (the base first) by way of files."""
    headers = []
    for number, tensor in enumerate(tensors):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        save_file({"x": tensor}, place / "model.safetensors")
        headers.append(read_headers(place, "model")["x"])
    count = tensors[0].numel()
    shared = {"normalize": False, "lambda": 1.0, **{key: value for key, value in values.items() if key != "int8_mask"}}
    if method == "linear":
        rule, bands = Average(tuple(values["weight"]), shared["normalize"]), ()
    else:
        kind = merge_methods.get(method)
        gammas = values.get("gamma", [0.0] * (len(tensors) - 1))
        bands = tuple(
            kept_band(kind.sparsification_method, count, density, gamma)
            for density, gamma in zip(values["density"], gammas, strict=True)
        )
        vote = kind.consensus_method is not None
        rule = Combination(tuple(values["weight"]), vote, shared["normalize"], shared["lambda"], dtype)
    job = DirectTensor("x", tuple(headers), dtype, out_dtype, rule, bands)
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    spec = TensorSpec("x", str(out_dtype).removeprefix("torch."), tuple(tensors[0].shape))
    with ShardFiles(folder, [spec], 0) as output:
        merge_directly([(job, output)], threads, report or (lambda name, nbytes: None))
    return load_file(folder / "model.safetensors")["x"]


def merge_stock(tensors, method, values, dtype, out_dtype) -> torch.Tensor:
    base = None if method == "linear" else 0
    return merge_tensors(tensors, method, parameters=values, base_index=base, dtype=dtype, out_dtype=out_dtype)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal dtype, shape and bits: the sign of a zero counts."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(ours.view(BITS[ours.dtype]), theirs.view(BITS[ours.dtype]))


@st.composite
def cases(draw):
    """Tensors without ties, a method and its parameters."""
    method = draw(st.sampled_from(METHODS))
    count = draw(st.integers(1, 4))
    shape, dtype, stored = draw(SHAPES), draw(DTYPES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def normal(spread):
        sizes = torch.exp2(torch.rand(shape, generator=generator) * spread - spread)
        return (torch.randn(shape, generator=generator) * sizes).to(stored)

    base = normal(1) * (torch.rand(shape, generator=generator) < 0.9)  # some zeros, of both signs
    changed = [(base.float() + 0.05 * normal(6).float()).to(stored) for _ in range(count)]
    changed = [without_ties(base, one, dtype) for one in changed]
    weights = draw(
        st.lists(st.sampled_from([1.0, 1.0, 0.3, 0.0, -0.6, 1.7]), min_size=count, max_size=count).filter(
            lambda found: method != "linear" or abs(sum(found)) > 0.1
        )
    )
    values = {"weight": weights, "normalize": draw(st.booleans())}
    if method == "linear":
        values["weight"] = [0.4, *weights] if abs(sum(weights) + 0.4) > 0.1 else [1.4, *weights]
        return method, [base, *changed], values, dtype, draw(DTYPES)
    densities = st.sampled_from([0.0, 1e-6, 0.1, 0.37, 0.5, 0.93, 0.9999, 1.0])
    values["density"] = draw(st.lists(densities, min_size=count, max_size=count))
    values["lambda"] = draw(st.sampled_from([1.0, 0.7, -1.3]))
    values["int8_mask"] = draw(st.booleans())
    if method.startswith("breadcrumbs"):
        gammas = st.sampled_from([0.0, 0.01, 0.2, 0.9])
        values["gamma"] = draw(st.lists(gammas, min_size=count, max_size=count))
    return method, [base, *changed], values, dtype, draw(DTYPES)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_bits_equal_stock_mergekits_where_nothing_ties(case, small_pieces, tmp_path):
    method, tensors, values, dtype, out_dtype = case
    stock = merge_stock(tensors, method, values, dtype, out_dtype)
    if not stock.isfinite().all():  # weights that cancel out in float16, where mergekit's smallest divisor is zero
        with refused("merge-not-finite"):
            merge_here(tmp_path, tensors, method, values, dtype, out_dtype)
        return
    assert_same_bits(merge_here(tmp_path, tensors, method, values, dtype, out_dtype), stock)


@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs", "ties", "breadcrumbs_ties"])
@pytest.mark.parametrize("weights", [[0.6, -0.6], [1.0, -1.0, 0.0], [0.0, 0.0], [3e-9, 4e-9]])
def test_weights_that_cancel_out_are_not_divided_by(method, weights, small_pieces, tmp_path):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(20, 20, generator=generator)
    tensors = [base, *(base + torch.randn(20, 20, generator=generator) for _ in weights)]
    values = {"weight": weights, "density": [0.4] * len(weights), "normalize": True}
    values |= {"gamma": [0.1] * len(weights)} if method.startswith("breadcrumbs") else {}
    stock = merge_stock(tensors, method, values, torch.float32, torch.float32)
    assert_same_bits(merge_here(tmp_path, tensors, method, values, torch.float32, torch.float32), stock)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["ties", "breadcrumbs", "breadcrumbs_ties"]),
    dtype=DTYPES,
    seed=st.integers(0, 10_000),
    densities=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    gamma=st.sampled_from([0.0, 0.03, 0.4]),
)
def test_of_changes_that_tie_the_first_are_the_largest(method, dtype, seed, densities, gamma, small_pieces, tmp_path):
    def ranked(tensor, density, method, rescale_norm=None, gamma=0.0, **_):
        """Rank by magnitude, then by place, and keep what mergekit keeps by its unstable sort."""
        entries = tensor.reshape(-1)
        order = torch.sort(entries.double().abs(), descending=True, stable=True).indices
        keep = int(density * entries.numel())
        outliers = min(entries.numel() - keep, int(gamma * entries.numel()))
        if method == SparsificationMethod.magnitude:
            keep, outliers = max(keep, 1), 0
        mask = torch.zeros_like(entries)
        mask[order[outliers : outliers + keep]] = 1
        return tensor * mask.view(tensor.shape)

    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, (29, 17), generator=generator).to(dtype)
    tensors = [base, *((base + torch.randint(-2, 3, base.shape, generator=generator)).to(dtype) for _ in densities)]
    values = {"weight": [1.0] * len(densities), "density": densities, "normalize": True}
    if method != "ties":
        values["gamma"] = [gamma] * len(densities)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generalized_task_arithmetic, "sparsify", ranked)
        expected = merge_stock(tensors, method, values, dtype, dtype)
    assert_same_bits(merge_here(tmp_path, tensors, method, values, dtype, dtype), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(tmp_path, small_pieces, threads):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(3000, generator=generator).bfloat16() for _ in range(3)]
    values = {"weight": [1.0, 1.0], "density": [0.3, 0.6], "normalize": True}
    once = merge_here(tmp_path, tensors, "ties", values, torch.bfloat16, torch.bfloat16, threads=1)
    assert_same_bits(merge_here(tmp_path, tensors, "ties", values, torch.bfloat16, torch.bfloat16, threads), once)
    assert torch.get_num_threads() > 0


def test_pieces_of_the_real_size(tmp_path):
    generator = torch.Generator().manual_seed(2)
    shape = (3, changes.SPAN + 12_345)
    base = torch.randn(shape, generator=generator)
    tensors = [base, *(base + 0.01 * torch.randn(shape, generator=generator) for _ in range(2))]
    values = {"weight": [1.0, 0.5], "density": [0.31, 0.77], "normalize": True}
    tensors = [base, *(without_ties(base, one, torch.float32) for one in tensors[1:])]
    stock = merge_stock(tensors, "ties", values, torch.float32, torch.bfloat16)
    assert_same_bits(merge_here(tmp_path, tensors, "ties", values, torch.float32, torch.bfloat16), stock)


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_refused(tmp_path, small_pieces, density, value, place):
    tensors = [torch.arange(300.0) * factor for factor in (1, 1.5, 2)]
    tensors[place][177] = value
    values = {"weight": [1.0, 1.0], "density": [density, density], "normalize": True}
    with refused("merge-not-finite"):
        merge_here(tmp_path, tensors, "ties", values, torch.float32, torch.float32)


class Held:
    """Takes one merged tensor into memory."""

    def __init__(self, nbytes: int) -> None:
        self.content = bytearray(nbytes)

    def write(self, name: str, start: int, content: memoryview) -> None:
        self.content[start : start + len(content)] = bytes(content)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4), out_dtype=DTYPES, data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_several_recipes_make_of_the_same_inputs_is_what_each_makes_alone(
    tmp_path, small_pieces, seed, count, out_dtype, data
):
    generator = torch.Generator().manual_seed(seed)
    headers = []
    for number in range(count + 1):
        place = tmp_path / str(number)
        place.mkdir(exist_ok=True)
        values = torch.randn(7, 41, generator=generator).mul(8).round().div(8)  # with ties
        save_file({"x": values}, place / "model.safetensors")
        headers.append(read_headers(place, "model")["x"])
    weights = st.lists(st.sampled_from([1.0, 0.3, 0.0, -0.6]), min_size=count, max_size=count)
    jobs = []
    for _ in range(data.draw(st.integers(2, 5))):
        if data.draw(st.integers(0, 3)) == 0:
            rule, bands = Average((0.4, *data.draw(weights)), False), ()
        else:
            kind = data.draw(st.sampled_from([None, "magnitude", "magnitude_outliers"]))
            select = None if kind is None else SparsificationMethod[kind]
            densities = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=count, max_size=count))
            bands = tuple(kept_band(select, 287, density, 0.1 * density) for density in densities)
            rule = Combination(
                tuple(data.draw(weights)), data.draw(st.booleans()), data.draw(st.booleans()), 0.7, torch.float32
            )
        jobs.append(DirectTensor("x", tuple(headers), torch.float32, out_dtype, rule, bands))
        if isinstance(rule, Combination):  # the same mixture, scaled in other ways
            scales = data.draw(st.lists(st.sampled_from([1.0, -0.4, 0.0]), max_size=2))
            jobs += [replace(jobs[-1], rule=replace(rule, scale=scale)) for scale in scales]

    def made(some: list[DirectTensor], known: KnownCuts | None) -> list[bytes]:
        outputs = [Held(287 * out_dtype.itemsize) for _ in some]
        merge_directly(list(zip(some, outputs, strict=True)), 2, lambda name, nbytes: None, known)
        return [bytes(one.content) for one in outputs]

    known = KnownCuts()
    assert made(jobs, known) == [made([job], None)[0] for job in jobs] == made(jobs, known)


def test_overflow_of_the_saved_dtype_is_refused(tmp_path):
    tensors = [torch.ones(9), torch.full((9,), 1e6)]
    values = {"weight": [1.0], "density": [1.0]}
    with refused("merge-not-finite"):
        merge_here(tmp_path, tensors, "task_arithmetic", values, torch.float32, torch.float16)


def test_an_input_that_shrinks_is_an_error(tmp_path):
    tensors = [torch.ones(5000), torch.ones(5000)]
    values = {"weight": [1.0], "density": [1.0]}
    merge_here(tmp_path, tensors, "task_arithmetic", values, torch.float32, torch.float32)
    headers = [read_headers(tmp_path / str(number), "model")["x"] for number in range(2)]
    rule = Combination((1.0,), False, False, 1.0, torch.float32)
    job = DirectTensor("x", tuple(headers), torch.float32, torch.float32, rule, (None,))
    os.truncate(headers[1].file, 9000)
    (tmp_path / "model.safetensors").unlink()
    spec = TensorSpec("x", "float32", (5000,))
    with ShardFiles(tmp_path, [spec], 0) as output, refused("weights-changed"):
        merge_directly([(job, output)], 2, lambda name, nbytes: None)


def test_reported_bytes_are_those_written(tmp_path, small_pieces):
    tensors = [torch.randn(1000) for _ in range(3)]
    values = {"weight": [1.0, 1.0], "density": [0.3, 1.0], "normalize": True}
    seen = []
    merge_here(tmp_path, tensors, "ties", values, torch.float32, torch.bfloat16, report=lambda *news: seen.append(news))
    assert {name for name, _ in seen} == {"x"} and sum(nbytes for _, nbytes in seen) == 2000
