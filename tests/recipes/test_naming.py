"""What tensors are called in a merge, and which of them nothing was measured of.

python -m pytest tests/recipes/test_naming.py
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from utils.models.checkpoints import open_checkpoint
from utils.pair.config import ModelEntry
from utils.recipes.naming import LocalModels, Recorded, name_recorded
from utils.recipes.recipe import renamed_files

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


def test_stored_buffers_stand_beside_what_was_measured(base):
    checkpoint = open_checkpoint(str(base))
    parameters = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    recorded = {name: Recorded(value.numel(), value.ndim > 1) for name, value in parameters.items()}
    written = LocalModels(ModelEntry(name=str(base), type="base"), []).written
    naming = name_recorded(recorded, written, grouped=False)
    buffers = [name for name in checkpoint.tensors if name not in parameters]
    assert len(buffers) >= 4 and sorted(naming.beside) == sorted(buffers)
    for text in naming.beside:
        assert [name for name in written.names if text in name] == [text]


def test_files_are_renamed_under_filters_too():
    saliency = [{"filter": "act_fn.beta", "value": ""}, {"value": "a"}]
    assert renamed_files(saliency, str.upper) == [{"filter": "act_fn.beta", "value": ""}, {"value": "A"}]
    assert renamed_files("a", str.upper) == "A" and renamed_files("", str.upper) == ""
