"""Instructions for bfloat16 are used where products are exact, and by work that is alone in its process.

python -m pytest tests/test_exact_products.py
"""

import pytest
import torch

from utils.exact_products import alone_in_process, exact_products, in_float32
from utils.workers.local import LocalWorkers
from utils.workers.piece import Piece

CPU = torch.device("cpu")


def setting(*values):
    with exact_products(*values):
        return torch.backends.mkldnn.matmul.fp32_precision


def test_it_takes_values_in_bfloat16_and_nobody_else_at_work():
    ours, float32 = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert before != "bf16" and setting(ours) == before
    with alone_in_process():
        assert setting(ours, ours) == "bf16"
        assert setting(float32) == setting(ours, float32) == setting(ours.half()) == setting(ours.to("meta")) == before
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        with pytest.raises(KeyError), exact_products(ours):
            raise KeyError
    assert setting(ours) == before == torch.backends.mkldnn.matmul.fp32_precision


def test_products_are_exact_and_others_stay_so():
    values = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    ours = values.bfloat16()
    with alone_in_process(), exact_products(ours):
        found = ours.float() @ ours.float()
    torch.testing.assert_close(found.double(), ours.double() @ ours.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((values @ values).double(), values.double() @ values.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_lengths_repeat_where_they_are_used(count):
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    filled = in_float32(rows, True)
    assert len(filled) == (64 if count > 32 else 32) and filled.dtype == torch.float32
    assert torch.equal(filled[:count], rows.float()) and not filled[count:].any()
    assert torch.equal(in_float32(rows, False), rows.float())


def piece_setting(place):
    return setting(torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize(("at_once", "pieces", "expected"), [(1, 2, True), (2, 1, True), (2, 2, False)])
def test_pieces_side_by_side_leave_it(at_once, pieces, expected):
    work = [Piece(f"piece{number}", piece_setting) for number in range(pieces)]
    found = LocalWorkers((CPU,), at_once).run(work, None, lambda label, steps: None)
    assert [one == "bf16" for one in found] == [expected] * pieces
