"""Squared gradients over axes and Gram matrices of rows, by factors and by gradients, against plain autograd.

python -m pytest tests/guidance/gram_mean/test_joint_pass.py
"""

import pytest
import torch

from tests.plain_gradients import CPU, opened, plain_gradients, token_lists
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, OTHERS, save_any
from utils.guidance.gram_mean.input_pass import Side
from utils.guidance.gram_mean.joint_pass import joint_pass
from utils.passes.gradient_factors import factors_pay

LENGTHS = (5, 2, 23, 7)  # by factors, and one that is too long for it


def measured(folder, samples, dtype):
    decoder, weights = opened(folder, dtype)
    axes, rows = {}, {}
    with joint_pass([Side(decoder, weights, samples)], CPU, lambda layer: None) as passed:
        for part in passed.parts:
            axes |= part.axes
            rows |= part.rows
    return axes, rows


@pytest.mark.parametrize("family", few([*FAMILIES, *OTHERS], "llama", "gemma3", "gpt2"))
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_sums_of_squares_equal_those_of_plain_gradients(family, dtype, close, tmp_path):
    save_any(family, tmp_path)
    samples = token_lists(LENGTHS)
    axes, rows = measured(tmp_path, samples, dtype)
    model, _, gradients = plain_gradients(tmp_path, samples, dtype)
    embeddings = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, value in model.named_parameters():
        if value.dim() > 2:
            continue
        own = [gradients[name, at].double() for at in range(len(samples)) if (name, at) in gradients]
        squares = sum((one.square() for one in own), torch.zeros_like(value, dtype=torch.float64))
        expected = (squares.sum(1), squares.sum(0) / squares.sum()) if value.dim() == 2 else (squares.reshape(-1),)
        for found, axis in zip(axes[name], expected, strict=True):
            torch.testing.assert_close(found, axis, rtol=close, atol=close * float(axis.mean()), msg=name)
        if id(value) in embeddings:
            gram = sum(one.t() @ one for one in own)
            torch.testing.assert_close(rows[name], gram, rtol=close, atol=close * float(gram.diagonal().mean()))
    assert factors_pay(5, 32, 32) and not factors_pay(23, 32, 32)
