"""A language tower whose tensors are not cut like those of the model it belongs to.

python -m pytest tests/models/test_language_tower.py
"""

import pytest

from tests.architectures.shrinking import tiny_model
from tests.architectures.sweep import read_rows
from tests.refusals import refused
from utils.models.language_tower import as_whole_model
from utils.models.opening import open_checkpoint

NOT_OF_A_TOWER = ("model_type", "architectures", "rope_scaling", "rope_parameters", "dtype", "tie_word_embeddings")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`whole` stores its experts stacked; `stacked` and `apart` are one tower."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("tower")
    whole = tiny_model({row.label: row for row in read_rows()}["qwen3_vl_moe:image-text"])
    settings = whole.config.get_text_config(decoder=True).to_dict()
    own = {key: value for key, value in settings.items() if key not in NOT_OF_A_TOWER}
    tower = Qwen3MoeForCausalLM(Qwen3MoeConfig(**own, tie_word_embeddings=whole.config.tie_word_embeddings))
    whole.save_pretrained(folder / "whole")
    tower.save_pretrained(folder / "apart")
    tower.save_pretrained(folder / "stacked", save_original_format=False)
    return folder


def test_experts_apart_beside_stacked_ones_are_refused_with_the_way_out(folder):
    whole, apart, stacked = (open_checkpoint(str(folder / name)) for name in ("whole", "apart", "stacked"))
    with refused("model-stored-unlike", "save_original_format=False"):
        as_whole_model(apart, whole)
    found = as_whole_model(stacked, whole)  # which is what that makes of it
    name = "layers.0.mlp.experts.down_proj"
    assert found.tensors[f"model.language_model.{name}"].file == stacked.tensors[f"model.{name}"].file
