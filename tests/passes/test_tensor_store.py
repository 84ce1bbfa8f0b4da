"""Tensors that wait in a file come back bit for bit, with their strides, and leave nothing behind.

python -m pytest tests/passes/test_tensor_store.py
"""

import weakref
from contextlib import closing

import pytest
import torch

from utils.passes.tensor_store import TensorStore

CPU = torch.device("cpu")
TENSORS = {
    "plain": torch.randn(1, 5, 7),
    "16 bits": torch.randn(3, 4).to(torch.bfloat16),
    "transposed": torch.randn(2, 3, 4).transpose(1, 2),
    "a slice": torch.randn(4, 6)[:, 1:3],
    "a number": torch.tensor(float("nan")),
    "nothing": torch.empty(0, 3),
    "one row for all": torch.randn(1, 3).expand(4, 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_comes_back_is_what_was_put_by(tmp_path, name):
    tensor = TENSORS[name]
    with closing(TensorStore(CPU, tmp_path)) as store:
        other, stored = store.put(torch.ones(3)), store.put(tensor)
        for found in (store.take(stored), store.take(stored)):
            assert found.dtype == tensor.dtype and torch.equal(found.nan_to_num(5), tensor.nan_to_num(5))
            assert found.stride() == tensor.stride() or name in ("a slice", "one row for all")
        assert store.take(other).tolist() == [1, 1, 1]
        assert list(tmp_path.iterdir()) == []  # the file has no name


def test_memory_of_what_was_put_by_is_free(tmp_path):
    tensor = torch.randn(4)
    freed = weakref.ref(tensor)
    with closing(TensorStore(CPU, tmp_path)) as store:
        store.put(tensor)
        del tensor
        assert freed() is None


def test_the_host_keeps_what_comes_from_another_device(tmp_path):
    with closing(TensorStore(torch.device("meta"), tmp_path / "absent")) as store:  # no file is asked for
        assert store.take(store.put(torch.ones(2, 3))).device.type == "meta"
