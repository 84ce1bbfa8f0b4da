"""Factors of weights' gradients, taken from modules as a sample goes back, against the gradients of plain autograd.

python -m pytest tests/passes/test_weight_uses.py
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from utils.passes.gradient_factors import axis_squares, row_gram
from utils.passes.hand_over import handed_over
from utils.passes.weight_uses import WeightUses

VOCABULARY, HIDDEN, TOKENS = 50, 40, 9


class Tiny(nn.Module):
    """An embedding, linear modules that share inputs, and a head; with ways to use a weight that are not a module's."""

    def __init__(self, *, tied=False, beside="", twice=False, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=padding)
        self.gate, self.up = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.down = Conv1D(HIDDEN, HIDDEN)
        self.expert, self.idle = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.beside, self.twice = beside, twice
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        hidden = hidden + self.down(self.gate(hidden).sigmoid() * self.up(hidden))
        hidden = hidden.index_add(1, torch.arange(3), self.expert(hidden[:, :3]))  # the tokens that came to it
        if self.twice:
            hidden = hidden + self.gate(hidden.tanh())
        if self.beside:
            hidden = hidden + hidden.tanh() @ self.get_parameter(self.beside)[:HIDDEN].square()
        return self.head(hidden)


def ids_of(tokens, seed):
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def taken(model, tokens=TOKENS, seed=1, pays=lambda name, parameter, count: True):
    """(gradients that were computed, uses that were handed over) by name, of one sample."""
    ids = ids_of(tokens, seed)
    gradients, uses = {}, {}
    parameters = dict(model.named_parameters())
    watching = WeightUses(pays, lambda name, parameter, own: uses.update({name: list(own)}))
    with (
        handed_over(parameters, lambda name, value, gradient: gradients.update({name: gradient})),
        watching.observed(model, parameters) as on_graph,
    ):
        loss = cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:])
        on_graph([loss])
        loss.backward()
    assert not any("forward" in vars(module) for module in model.modules())
    return gradients, uses


def plain(model, tokens=TOKENS, seed=1):
    """Gradients by name, of autograd alone."""
    model = copy.deepcopy(model)
    ids = ids_of(tokens, seed)
    cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:]).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_squares(uses, gradient, close):
    rows, columns = axis_squares(uses, len(gradient))
    squares = gradient.double().square()
    least = close * float(squares.mean())
    torch.testing.assert_close(rows.double(), squares.sum(1), rtol=close, atol=least * gradient.shape[1])
    torch.testing.assert_close(columns.double(), squares.sum(0), rtol=close, atol=least * len(gradient))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, int(ids_of(TOKENS, 1)[0, 2])])
def test_every_weight_by_its_factors_and_all_else_by_its_gradient(padding, tied, dtype, close):
    model = Tiny(tied=tied, padding=padding).to(dtype)
    gradients, uses = taken(model)
    expected = plain(model)
    weights = {name for name, value in expected.items() if value.dim() == 2}
    assert uses.keys() == weights and gradients.keys() == expected.keys() - weights  # idle: in neither
    for name in weights:
        assert_squares(uses[name], expected[name], close)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=close, atol=close * float(expected[name].abs().max()))
    (gate,), (up,) = uses["gate.weight"], uses["up.weight"]
    assert gate.right is up.right  # so that its products are computed once
    dense = expected["embedding.weight"].double()
    gram = row_gram(uses["embedding.weight"]).double().detach()
    assert float((gram - dense.t() @ dense).norm()) < close * float((dense.t() @ dense).norm())


@pytest.mark.parametrize("name", ["gate.weight", "embedding.weight", "head.weight"])
def test_a_weight_that_something_else_reads_has_its_whole_gradient(name):
    model = Tiny(beside=name)
    gradients, uses = taken(model)
    expected = plain(model)
    assert name not in uses and "up.weight" in uses
    torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-6)
    gradients, uses = taken(Tiny(tied=True, beside="embedding.weight"))
    assert "embedding.weight" in gradients and "embedding.weight" not in uses


def test_a_module_that_is_called_twice_has_two_uses():
    model = Tiny(twice=True)
    _, uses = taken(model)
    assert len(uses["gate.weight"]) == 2
    assert_squares(uses["gate.weight"], plain(model)["gate.weight"], 1e-5)


def test_what_does_not_pay_or_is_of_another_kind_is_left_to_the_gradient():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Tiny()
    model.up = Scaled(HIDDEN, HIDDEN)
    gradients, uses = taken(model, pays=lambda name, parameter, count: name != "head.weight" and count < TOKENS)
    assert uses.keys() == {"expert.weight"}  # three tokens came to it
    expected = plain(model)
    for name in expected.keys() - uses.keys():
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-6)


def test_weights_that_require_no_gradient_are_not_watched():
    model = Tiny()
    model.gate.weight.requires_grad_(False)
    gradients, uses = taken(model)
    assert "gate.weight" not in gradients.keys() | uses.keys()
    assert gradients["up.bias"] is not None
