"""The quality benchmark's losses: against a loop over single tokens, and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality_losses import IGNORED, mean_and_least, mean_loss, padded_batches, share_kept
from demo.small_model import Shape, new_model, train_tokenizer

ROWS = [[1, 5, 9, 4, 4], [1, 7], [1, 3, 3, 8, 2, 6, 11, 30], [1], [1, 30, 20, 10]]


@pytest.fixture(scope="module")
def model():
    tokenizer = train_tokenizer(["a few words"], 300)
    return new_model(Shape(hidden=32, intermediate=48, blocks=2, heads=2), tokenizer, seed=1).eval()


def looped(model, rows):
    """One row at a time, one token at a time, no padding."""
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row])).logits[0].double()
            losses += [-logits[i].log_softmax(-1)[token].item() for i, token in enumerate(row[1:])]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tokens_at_once", [1, 12, 4096])
def test_every_predicted_token_counts_once_and_alike(model, tokens_at_once):
    assert mean_loss(model, ROWS, tokens_at_once) == pytest.approx(looped(model, ROWS), rel=1e-6)


def test_rows_without_a_prediction_are_refused(model):
    with pytest.raises(ValueError, match="predict"):
        mean_loss(model, [[1], [2]])


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=12), st.integers(1, 80))
def test_batches_hold_every_row_once_within_the_limit(rows, limit):
    batches = padded_batches(rows, limit)
    found = sorted([token for token in line.tolist() if token != IGNORED] for batch in batches for line in batch)
    assert found == sorted(rows)
    assert all(batch.numel() <= limit or len(batch) == 1 for batch in batches)


def test_share_kept_by_hand():
    assert share_kept(4.0, 3.75, 3.5) == 0.5
    assert share_kept(4.0, 4.25, 3.5) == -0.5
    assert mean_and_least({"a": 0.5, "b": 0.25}) == (0.375, 0.25)


@pytest.mark.parametrize("expert", [4.0, 4.5, math.nan])
def test_an_expert_without_gain_is_refused(expert):
    with pytest.raises(ValueError, match="no gain"):
        share_kept(4.0, 3.9, expert)
