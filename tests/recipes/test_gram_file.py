"""Triangles of Gram matrices in a file, and numbers that it refuses.

python -m pytest tests/recipes/test_gram_file.py
"""

import pytest
import torch

from utils.recipes.gram_file import GramFileWriter, NotFiniteError, input_gram, row_gram
from utils.recipes.saliency_vectors import VectorKey, close_files


def test_matrices_come_back_as_they_were(tmp_path):
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    gram, path = rows.t() @ rows, tmp_path / "one_grams.safetensors"
    gram = (gram + gram.t()) / 2
    with GramFileWriter(path, ["a", "b"]) as file:
        file.add_inputs("a", 1, gram, ["b"])
        file.add_rows("a", gram.double())
    assert torch.equal(input_gram(VectorKey(path, "b")).gram, gram)
    assert torch.equal(row_gram(VectorKey(path, "a")), gram)
    close_files()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value, tmp_path):
    gram = torch.eye(4)
    gram[2, 1] = value
    with GramFileWriter(tmp_path / "one_grams.safetensors", ["a"]) as file, pytest.raises(NotFiniteError):
        file.add_inputs("a", 1, gram)
