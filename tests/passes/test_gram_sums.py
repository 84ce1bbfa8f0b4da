"""Sums of x x' that are computed on one side of the diagonal, against the whole product in float64.

python -m pytest tests/passes/test_gram_sums.py
"""

import pytest
import torch

from utils.exact_products import alone_in_process
from utils.passes.gram_sums import add_gram, complete


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 30, 511, 1030])
def test_a_sum_over_several_samples(width, dtype):
    samples = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)) for tokens in (1, 17, 40)]
    total = torch.zeros(width, width)
    with alone_in_process():
        for rows in samples:
            add_gram(total, rows.to(dtype))
    rows = torch.cat(samples).to(dtype).double()
    torch.testing.assert_close(complete(total).double(), rows.t() @ rows, rtol=1e-5, atol=1e-4)


def test_several_sums_are_completed_at_a_time():
    rows = torch.randn(20, 600, generator=torch.Generator().manual_seed(0))
    totals = torch.zeros(2, 600, 600)
    add_gram(totals[0], rows)
    add_gram(totals[1], 2 * rows)
    first, second = complete(totals)
    torch.testing.assert_close(second, 4 * first)
    assert torch.equal(first.triu(), first.tril().t())
