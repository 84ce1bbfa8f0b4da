"""Distances between logits, chunk by chunk, against all logits at once.

python -m pytest tests/guidance/sens_merging/test_distances.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.guidance.sens_merging.distances import mean_distance, real_tokens, tokens_at_once
from utils.pair.batches import MicroBatch

CPU = torch.device("cpu")


def heads(rows, others, hidden=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(size, hidden, generator=generator).to(dtype) for size in (rows, others))
    return (lambda finals: finals @ first.T), (lambda finals: torch.tanh(finals @ second.T))


def hidden_states(tokens, seed, hidden=6, dtype=torch.float32):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(3, 9), st.integers(3, 9))
def test_chunks_do_not_show_and_only_common_rows_count(tokens, at_once, rows, others):
    ours, theirs = hidden_states(tokens, 1), hidden_states(tokens, 2)
    first, second = heads(rows, others)
    found, sizes = mean_distance(ours, theirs, first, second, CPU, at_once)
    common = min(rows, others)
    gaps = first(ours)[:, :common].double() - second(theirs)[:, :common].double()
    assert sizes == (rows, others) and found.dtype == torch.float64
    assert float(found) == pytest.approx(float(gaps.square().sum(-1).sqrt().mean()), rel=1e-5)


def test_logits_of_half_precision_are_compared_in_float32():
    """A large and a small difference: in bfloat16 the small one would vanish from the sum of squares."""
    ours = torch.full((1, 2), 1.0, dtype=torch.bfloat16)
    logits = torch.tensor([[10.0, 0.0625]], dtype=torch.bfloat16), torch.tensor([[7.0, 0.1875]], dtype=torch.bfloat16)
    found, _ = mean_distance(ours, ours, lambda _: logits[0], lambda _: logits[1], CPU, 8)
    assert float(found) == pytest.approx((9 + 0.125**2) ** 0.5, rel=1e-7)


def test_equal_models_are_exactly_0_apart():
    ours = hidden_states(5, 1)
    first, _ = heads(7, 7)
    assert float(mean_distance(ours, ours.clone(), first, first, CPU, 2)[0]) == 0.0


def test_different_numbers_of_tokens_are_refused():
    with pytest.raises(ValueError, match="3 and 4 tokens"):
        mean_distance(hidden_states(3, 1), hidden_states(4, 1), *heads(7, 7), CPU, 2)


def test_pads_are_left_out_and_the_order_is_kept():
    batches = [MicroBatch.of([[5, 6, 7], [8]]), MicroBatch.of([[1, 2]])]
    finals = [torch.arange(6.0).reshape(2, 3, 1), torch.tensor([[[7.0], [8.0]]])]
    assert real_tokens(finals, batches).flatten().tolist() == [0, 1, 2, 3, 7, 8]


def test_no_more_logits_are_asked_for_than_the_chunk():
    asked = []

    def counting(finals):
        asked.append(len(finals))
        return finals

    mean_distance(hidden_states(10, 1), hidden_states(10, 2), counting, counting, CPU, 4)
    assert asked == [4, 4, 4, 4, 2, 2]
    assert tokens_at_once(2**30) == 1 and 1 < tokens_at_once(256_000) < 100 < tokens_at_once(32_000)
