"""What experts are given, against sums token by token in float64.

python -m pytest tests/passes/test_expert_inputs.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.refusals import refused
from tests.tiny_stacks import DOWN, EXPERTS, INNER, UP, WIDTH, Experts
from utils.pair.batches import MicroBatch
from utils.passes.expert_inputs import ExpertInputs, StackSums


def observed(block, batch, hidden, chosen, gates):
    inputs = ExpertInputs((UP, DOWN))
    with inputs.attached(block), torch.no_grad():
        inputs.begin(batch)
        block["experts"](hidden, chosen, gates)
    return inputs.checked(0)


@given(st.integers(0, 2**31), st.booleans(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_sums_are_those_of_each_experts_own_tokens(seed, transposed, lengths):
    torch.manual_seed(seed)
    block = nn.ModuleDict({"experts": Experts(transposed)})
    batch = MicroBatch.of([[0] * length for length in lengths])
    tokens = batch.input_ids.numel()
    hidden, gates = torch.randn(tokens, WIDTH), torch.rand(tokens, 2)
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    found = observed(block, batch, hidden, chosen, gates)
    real = torch.arange(batch.input_ids.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    squares = {UP: torch.zeros(EXPERTS, WIDTH).double(), DOWN: torch.zeros(EXPERTS, INNER).double()}
    counts = torch.zeros(EXPERTS).double()
    for token in real.flatten().nonzero().flatten().tolist():
        for place in range(2):
            expert, gate, x = int(chosen[token, place]), gates[token, place].double(), hidden[token].double()
            matrix = block["experts"].up_proj[expert].detach().double()
            inner = torch.relu(x @ matrix if transposed else matrix @ x)
            squares[UP][expert] += (gate * x) ** 2
            squares[DOWN][expert] += (gate * inner) ** 2
            counts[expert] += 1
    for component in (UP, DOWN):
        own = found.get(component)
        assert torch.equal(own.tokens, counts)
        assert torch.allclose(own.squares, squares[component], rtol=1e-5, atol=1e-9)
        assert own.inputs_last is not transposed


def test_an_expert_with_few_tokens_leans_on_its_layer():
    squares = torch.tensor([[4.0, 0.0], [2.0, 6.0]]).double()
    sums = StackSums(squares, torch.tensor([1.0, 8.0]).double(), inputs_last=True)
    metric = sums.metric(torch.ones(2, 1, 2), divisor=2.0, fewest=4)
    mean = [1.5, 1.5]
    assert metric[1, 0].tolist() == [1.0, 3.0]
    assert metric[0, 0].tolist() == pytest.approx([0.25 * 2.0 + 0.75 * mean[0], 0.75 * mean[1]])


def test_experts_that_no_token_is_given_have_sums_of_zero():
    class WithIdentity(Experts):
        def forward(self, hidden, chosen, gates):
            return super().forward(hidden, chosen, gates) + hidden * (gates * (chosen >= EXPERTS)).sum(1, keepdim=True)

    block, batch = nn.ModuleDict({"experts": WithIdentity()}), MicroBatch.of([[0, 0]])
    beyond = torch.full((2, 1), EXPERTS)
    found = observed(block, batch, torch.randn(2, WIDTH), beyond, torch.ones(2, 1))
    for component, matrices in ((UP, block["experts"].up_proj), (DOWN, block["experts"].down_proj)):
        assert found[component].tokens.tolist() == [0] * EXPERTS
        metric = found[component].metric(matrices.detach(), 2.0, fewest=32)
        assert metric.shape == matrices.shape and not metric.any()


def test_experts_that_cannot_be_watched_are_refused():
    class Summed(Experts):
        def forward(self, hidden, chosen, gates):
            return torch.einsum("tw,eiw->ti", hidden, self.up_proj)

    block = nn.ModuleDict({"experts": Summed()})
    with refused("model-unsupported", "in a way that cannot be watched"):
        observed(block, MicroBatch.of([[0, 0]]), torch.randn(2, WIDTH), torch.zeros(2, 1).long(), torch.ones(2, 1))
