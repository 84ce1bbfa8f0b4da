"""Gram matrices of an embedding's and a head's gradients by their factors, against the gradients themselves.

python -m pytest tests/passes/test_row_factors.py
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from utils.passes.row_factors import RowFactors
from utils.passes.row_grams import RowGrams

VOCABULARY, HIDDEN, TOKENS = 50, 40, 9


class Tiny(nn.Module):
    """An embedding, something between, and a head; with ways in which a weight may be used that is not a module's."""

    def __init__(self, *, tied, extra=0.0, padding=None, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=padding)
        self.between = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
        self.extra = extra
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        hidden = self.between(self.embedding(ids)).tanh()
        logits = self.head(hidden)
        return logits + self.extra * hidden @ self.head.weight.t().square() if self.extra else logits


def gradients(model, factors, tokens=TOKENS, dtype=torch.float32):
    """By name, each weight's gradient and what its factors give for G' G; None where they give nothing."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    model.to(dtype)
    with factors.observed(model):
        cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:]).backward()
        weights = {"embedding.weight": model.embedding.weight, "head.weight": model.head.weight}
        return {name: (one.grad, factors.gram(name, one.grad)) for name, one in weights.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gram_matrix_of_the_gradient_itself(tied, dtype, close):
    for gradient, gram in gradients(Tiny(tied=tied), RowFactors(), dtype=dtype).values():
        dense = gradient.double().t() @ gradient.double()
        assert gram.dtype == torch.float32
        assert float((gram - dense).norm() / dense.norm()) < close


def test_a_weight_that_is_used_beside_its_module_is_not_taken_for_its_factors():
    found = gradients(Tiny(tied=True, extra=0.3), RowFactors())
    assert all(gram is None for _, gram in found.values())
    found = gradients(Tiny(tied=False, extra=0.3), RowFactors())
    assert found["head.weight"][1] is None and found["embedding.weight"][1] is not None


def test_an_embedding_that_does_more_and_long_samples_are_left_to_the_gradient():
    found = gradients(Tiny(tied=False, padding=0), RowFactors())
    assert found["embedding.weight"][1] is None and found["head.weight"][1] is not None
    assert all(gram is None for _, gram in gradients(Tiny(tied=False), RowFactors(), tokens=HIDDEN + 1).values())
    assert all(gram is None for _, gram in gradients(Tiny(tied=True), RowFactors(), tokens=HIDDEN // 2).values())


def test_sums_are_the_same_with_and_without_factors():
    model = Tiny(tied=True, bias=True)
    watched, plain = (RowGrams(frozenset({"embedding.weight"})) for _ in range(2))
    for seed in range(3):
        ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        with watched.factors.observed(model):
            cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
            watched.add("embedding.weight", model.embedding.weight.grad)
        plain.add("embedding.weight", model.embedding.weight.grad)
    torch.testing.assert_close(watched.take("embedding.weight"), plain.take("embedding.weight"), rtol=1e-4, atol=1e-6)
    assert watched.factors.gram("embedding.weight", model.embedding.weight.grad) is None  # nothing is kept
