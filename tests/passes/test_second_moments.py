"""Second moments over real tokens: with pads, gathered or sample by sample, against sums in float64."""

import pytest
import torch
from torch import nn

from utils.pair.batches import MicroBatch
from utils.passes import second_moments
from utils.passes.second_moments import SecondMoments, column_square_sums, real_rows

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = [(5, 3, 1), (1, 4), (4, 4, 2), (7,), (3, 3)]
WIDTH = 6


@pytest.fixture(params=["by sample", "gathered", pytest.param("cuda", marks=needs_cuda)])
def way(request) -> tuple[torch.device, bool | None]:
    """Each way padded inputs are summed, as a device and `gather`; "gathered" takes that of a GPU on the CPU."""
    return torch.device("cuda" if request.param == "cuda" else "cpu"), True if request.param == "gathered" else None


def batch_of(lengths: tuple[int, ...]) -> MicroBatch:
    return MicroBatch.of([[1] * length for length in lengths])


def activations(batch: MicroBatch, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Inputs of a part; what stands where there is no token must not matter, so it is NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((*batch.input_ids.shape, WIDTH), generator=generator).to(dtype)
    return x if batch.mask is None else x.masked_fill(~batch.mask.unsqueeze(-1), float("nan"))


def real_tokens(batch: MicroBatch, x: torch.Tensor) -> torch.Tensor:
    """The rows of real tokens, sample after sample, in float64."""
    return torch.cat([row[:length] for row, length in zip(x.double(), batch.lengths, strict=True)])


def block_of(*paths: str) -> nn.ModuleDict:
    return nn.ModuleDict({path: nn.Identity() for path in paths})


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_real_tokens(way, dtype, flat):
    device, gather = way
    block, moments = block_of("q", "k", "down"), SecondMoments(["q", "k", "down"], gather=gather)
    expected, tokens = torch.zeros(2, WIDTH, dtype=torch.float64), 0
    with moments.attached(block):
        for number, lengths in enumerate(LENGTHS):
            batch = batch_of(lengths)
            shared, own = (activations(batch, dtype, seed=2 * number + place) for place in range(2))
            expected += torch.stack([real_tokens(batch, x).square().sum(dim=0) for x in (shared, own)])
            tokens += batch.tokens
            moments.begin(batch.to(device))
            shared, own = (x.flatten(0, 1) if flat else x for x in (shared.to(device), own.to(device)))
            for path, x in (("q", shared), ("k", shared), ("down", own)):
                block[path](x)
    sums = moments.checked(0, tokens)
    assert all(value.dtype == torch.float64 and value.device.type == device.type for value in sums.values())
    torch.testing.assert_close(sums["down"].cpu(), expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums["q"].cpu(), expected[0], rtol=1e-6, atol=0)
    assert torch.equal(sums["q"], sums["k"])


def test_rows_are_looked_up_once_and_gathered_once_an_input(monkeypatch):
    looked_up, summed = [], []
    monkeypatch.setattr(second_moments, "real_rows", lambda *args: looked_up.append(args) or real_rows(*args))
    monkeypatch.setattr(second_moments, "column_square_sums", lambda x: summed.append(x) or column_square_sums(x))
    block, moments = block_of("q", "k", "down"), SecondMoments(["q", "k", "down"], gather=True)
    with moments.attached(block):
        for lengths in ((4, 2, 1), (3, 3), (2, 5)):
            batch = batch_of(lengths)
            moments.begin(batch)
            shared, own = activations(batch, torch.float32), activations(batch, torch.float32, seed=1)
            for path, x in (("q", shared), ("k", shared), ("down", own)):
                block[path](x)
    assert len(looked_up) == 2, "the batch without pads needs no look-up"
    assert [len(x) for x in summed] == [7, 7, 6, 6, 7, 7]


def test_on_the_cpu_each_sample_is_summed_by_itself():
    """Bit for bit: results of earlier versions on the CPU are to stay."""
    block, moments, batch = block_of("q"), SecondMoments(["q"]), batch_of((300, 211, 47))
    x = activations(batch, torch.float32)
    with moments.attached(block):
        moments.begin(batch)
        block["q"](x)
    by_sample = [column_square_sums(row[:length]) for row, length in zip(x, batch.lengths, strict=True)]
    assert torch.equal(moments.sums["q"], torch.stack(by_sample).sum(dim=0))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_real_rows_are_the_places_of_the_tokens(lengths, way):
    device, _ = way
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = real_rows(mask.to(device), sum(lengths))
    assert rows.dtype == torch.int64 and rows.device.type == device.type
    assert rows.tolist() == mask.flatten().nonzero().flatten().tolist()


@needs_cuda
def test_nothing_waits_for_the_gpu():
    batch = batch_of((300, 20, 1)).to(torch.device("cuda"))
    x = activations(batch_of((300, 20, 1)), torch.bfloat16).cuda()
    block, moments = block_of("q"), SecondMoments(["q"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with moments.attached(block):
            moments.begin(batch)
            block["q"](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
