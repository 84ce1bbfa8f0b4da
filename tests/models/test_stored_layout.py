"""What a checkpoint's tensors are to a model, against what the formats are known to be.

python -m pytest tests/models/test_stored_layout.py
"""

import pytest
import torch

from tests.architectures.shrinking import tiny_model
from tests.architectures.sweep import read_rows
from tests.tiny_mixtures import weights
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights

ROWS = {row.label: row for row in read_rows()}
EXPERTS = 4


def saved(label, folder):
    model = tiny_model(ROWS[label])
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    return model, stored_layout(model, checkpoint), weights(folder)


def test_mixtral_stores_each_experts_matrices_on_their_own(tmp_path):
    """w1 is the gate, w3 what it gates, w2 the way down; in memory the first two are one matrix."""
    model, layout, stored = saved("mixtral:causal", tmp_path)
    path = "model.layers.1.mlp.experts"
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    up, down = (model.get_parameter(f"{path}.{part}").detach() for part in ("gate_up_proj", "down_proj"))
    for expert in range(EXPERTS):
        both = torch.cat([stored[name.format(expert, "w1")], stored[name.format(expert, "w3")]])
        assert torch.equal(up[expert], both)
        assert torch.equal(down[expert], stored[name.format(expert, "w2")])
    pieces = layout.split(f"{path}.gate_up_proj", up) | layout.split(f"{path}.down_proj", down)
    assert set(pieces) == {name.format(expert, part) for expert in range(EXPERTS) for part in ("w1", "w2", "w3")}
    assert all(torch.equal(piece, stored[own]) for own, piece in pieces.items())
    conversion = layout.conversions[f"{path}.gate_up_proj"]
    experts = {
        header.name.split(".")[5]: number
        for header, number in zip(conversion.sources, conversion.ordinals, strict=True)
    }
    assert experts == {str(expert): expert for expert in range(EXPERTS)}
    assert layout.can_split(f"{path}.gate_up_proj") and not layout.is_part(f"{path}.gate_up_proj")


def test_gpt_oss_stores_all_experts_in_one_tensor(tmp_path):
    model, layout, stored = saved("gpt_oss:causal", tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert layout.stored_names(name) == (name,)
    (piece,) = layout.split(name, model.get_parameter(name).detach()).values()
    assert torch.equal(piece, stored[name])


@pytest.mark.parametrize(
    "label", ["deepseek_v3:causal", "jamba:causal", "qwen2_5_vl:image-text", "kimi_k25:image-text"]
)
def test_every_parameter_is_fetched_as_transformers_loads_it(label, tmp_path):
    model, layout, stored = saved(label, tmp_path)
    assert not layout.missing and not layout.unread
    read = {header.name for name in model.state_dict() for header in layout.headers(name)}
    assert read == set(stored)
    names = [name for name in model.state_dict() if name in layout]
    fetched = StreamedWeights(layout, torch.device("cpu"), torch.float32).fetch(names)
    for name in names:
        assert torch.equal(fetched[name], model.state_dict()[name]), name


def test_parts_of_one_stored_tensor_are_no_tensors_of_their_own(tmp_path):
    """A vision tower's q, k and v that are stored as one."""
    model, layout, stored = saved("kimi_k25:image-text", tmp_path)
    fused = [name for name in stored if name.endswith("wqkv.weight")]
    parts = {name for name in model.state_dict() if any(one in fused for one in layout.stored_names(name))}
    assert len(parts) == 3 * len(fused) > 0
    assert all(layout.is_part(name) for name in parts)
    with pytest.raises(ValueError, match="only a part of"):
        layout.split(next(iter(parts)), torch.zeros(1))
