"""Gram matrices of what stacked experts are given, against sums token by token in float64.

python -m pytest tests/passes/test_expert_grams.py
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tiny_stacks import DOWN, EXPERTS, INNER, UP, WIDTH, Experts
from utils.passes.expert_grams import ExpertInputGrams, stack_bytes, summed_up

TOKENS = 5


def watched(seed, transposed):
    """A block's experts, what they were given, and the sums; some experts have no token."""
    torch.manual_seed(seed)
    block = nn.ModuleDict({"experts": Experts(transposed)})
    hidden, gates = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, 2)
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(TOKENS)])
    grams = ExpertInputGrams(SimpleNamespace(components_of=lambda layer: (UP, DOWN)))
    with grams.attached(0, block):
        block["experts"](hidden, chosen, gates)
    return block["experts"], hidden, chosen, grams.take()


def expected(experts, hidden, chosen):
    totals = {UP: torch.zeros(EXPERTS, WIDTH, WIDTH).double(), DOWN: torch.zeros(EXPERTS, INNER, INNER).double()}
    for token, own in zip(hidden.double(), chosen.tolist(), strict=True):
        for expert in own:
            matrix = experts.up_proj[expert].detach().double()
            inner = torch.relu(token @ matrix if experts.transposed else matrix @ token)
            totals[UP][expert] += torch.outer(token, token)
            totals[DOWN][expert] += torch.outer(inner, inner)
    return totals


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=25, deadline=None)
def test_sums_are_those_of_each_experts_own_tokens(seed, transposed):
    experts, hidden, chosen, found = watched(seed, transposed)
    totals = expected(experts, hidden, chosen)
    for component in (UP, DOWN):
        own = found[component]
        assert torch.allclose(own.total.double(), totals[component], rtol=1e-5, atol=1e-6)
        assert own.tokens.tolist() == [int((chosen == expert).sum()) for expert in range(EXPERTS)]
        assert own.inputs_last is not transposed
        assert not own.total.requires_grad


def test_models_count_by_the_tokens_of_their_texts():
    one, other = (expected(*watched(seed, False)[:3]) for seed in (1, 2))
    found = summed_up([watched(seed, False)[3] for seed in (1, 2)], [5, 10])
    for component in (UP, DOWN):
        wanted = one[component] / 5 + other[component] / 10
        assert torch.allclose(found[component].total.double(), wanted, rtol=1e-5, atol=1e-6)
    assert summed_up([watched(1, False)[3], {}], [5, 10]) == {}


@pytest.mark.parametrize("transposed", [False, True])
def test_the_estimate_is_what_is_held(transposed):
    experts = Experts(transposed)
    experts.is_transposed = transposed
    decoder = SimpleNamespace(components_of=lambda layer: (UP, DOWN), blocks=[nn.ModuleDict({"experts": experts})])
    held = sum(one.total.nbytes for one in watched(1, transposed)[3].values())
    assert stack_bytes(decoder, 0) == (held, 2 * EXPERTS * (WIDTH * (WIDTH + 1) + INNER * (INNER + 1)))
