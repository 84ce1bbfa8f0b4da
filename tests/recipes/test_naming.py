"""What tensors are called in a merge, and which of them nothing was measured of.

python -m pytest tests/recipes/test_naming.py
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from utils.models.checkpoints import open_checkpoint
from utils.pair.config import ModelEntry
from utils.recipes.naming import LocalModels, filters_without_vectors
from utils.recipes.recipe import renamed_files
from utils.recipes.saliency_vectors import open_vectors, vector_file_bytes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def base(tmp_path):
    """A model whose checkpoint stores buffers beside its parameters, in every block."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("apertus", **SIZES))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_stored_buffers_are_those_without_vectors(base, tmp_path):
    parameters = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    ones = {name: tuple(torch.ones(length) for length in value.shape) for name, value in parameters.items()}
    (tmp_path / "file").write_bytes(vector_file_bytes(ones))
    written = LocalModels(ModelEntry(name=str(base), type="base"), []).written
    found = filters_without_vectors(written, [open_vectors(tmp_path / "file")])
    buffers = [name for name in open_checkpoint(str(base)).tensors if name not in parameters]
    assert len(buffers) >= 4 and sorted(found) == sorted(buffers)
    for text in found:
        assert [name for name in written.names if text in name] == [text]


def test_files_are_renamed_under_filters_too():
    saliency = [{"filter": "act_fn.beta", "value": ""}, {"value": "a"}]
    assert renamed_files(saliency, str.upper) == [{"filter": "act_fn.beta", "value": ""}, {"value": "A"}]
    assert renamed_files("a", str.upper) == "A" and renamed_files("", str.upper) == ""
