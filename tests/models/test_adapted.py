"""Adapters named by a model class, on checkpoints that store the same under other names: the numbers of peft's own merge.

python -m pytest tests/models/test_adapted.py
"""

import pytest
import torch

from tests.architectures.shrinking import tiny_model
from tests.architectures.sweep import read_rows
from tests.refusals import refused
from tests.tiny_adapters import rename_in_adapter, save_adapter, save_merged
from tests.tiny_checkpoints import edit_tensors
from tests.tiny_merges import tensors
from tests.tiny_towers import text_model
from utils.models.opening import open_checkpoint
from utils.models.tensor_files import TensorFiles

EARLIER = {  # how names of the language tower began before transformers 4.52, and begin today
    "llava": ("model.language_model.", "language_model.model."),
    "gemma3": ("model.language_model.", "language_model.model."),
    "qwen2_5_vl": ("model.language_model.", "model."),
}
TOWERS = ("llava", "gemma3")  # which are language models of their own in transformers
KINDS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True, "r": 4, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "both towers, and a head": {"target_modules": ["q_proj", "qkv", "down_proj", "lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
}
# every family by one kind, one family by every kind
CASES = [*((family, "plain") for family in EARLIER), *(("llava", kind) for kind in list(KINDS)[1:]), ("gemma3", "dora")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each family."""
    rows = {row.label: row for row in read_rows()}
    found = {}
    for family in EARLIER:
        model = tiny_model(rows.get(f"{family}:image-text") or rows[f"{family}:causal"])
        found[family] = tmp_path_factory.mktemp(family) / "base"
        model.save_pretrained(found[family])
        if family in TOWERS:
            text_model(model).save_pretrained(found[family].parent / "tower")
    return found


def read_all(name):
    checkpoint = open_checkpoint(str(name))
    with TensorFiles(checkpoint.files) as files:
        return {name: files.read_whole(header) for name, header in checkpoint.tensors.items()}


def assert_as_merged(found, wanted, base, least=1):
    """Equal, name by name, and in at least so many tensors other than the base's."""
    assert found.keys() == wanted.keys() == base.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert sum(not torch.equal(found[name], base[name]) for name in base) >= least


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_numbers_are_those_of_peft(bases, tmp_path, family, kind):
    base = bases[family]
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merged = tensors(save_merged(base, adapter, tmp_path / "merged"))
    assert_as_merged(read_all(f"{base}+{adapter}"), merged, tensors(base), least=8)


@pytest.mark.parametrize("family", EARLIER)
def test_names_of_an_earlier_class_mean_the_same(bases, tmp_path, family):
    adapter = save_adapter(bases[family], tmp_path / "adapter", target_modules=r".*language_model.*(q_proj|down_proj)")
    earlier = rename_in_adapter(adapter, tmp_path / "earlier", *EARLIER[family])
    today, then = (read_all(f"{bases[family]}+{one}") for one in (adapter, earlier))
    assert_as_merged(then, today, tensors(bases[family]), least=8)


@pytest.mark.parametrize("family", TOWERS)
def test_of_the_language_tower_alone(bases, tmp_path, family):
    """Trained on the tower as a model of its own: the whole model's tower becomes what the tower becomes."""
    tower = bases[family].parent / "tower"
    adapter = save_adapter(tower, tmp_path / "adapter", use_rslora=True)
    wanted = tensors(save_merged(tower, adapter, tmp_path / "merged"))
    before, found = tensors(tower), read_all(f"{bases[family]}+{adapter}")
    changed = [name for name, value in wanted.items() if not torch.equal(value, before[name])]
    for name in changed:
        (own,) = [one for one in found if one.endswith(name.removeprefix("model.")) and "vision" not in one]
        torch.testing.assert_close(found[own], wanted[name], rtol=1e-5, atol=1e-6, msg=own)
    base = tensors(bases[family])
    assert len(changed) >= 8
    assert sum(not torch.equal(value, base[name]) for name, value in found.items()) == len(changed)


def test_of_a_matrix_that_is_stored_in_parts(tmp_path):
    """A mixture's experts are stacked in the class, and no tensor of the checkpoint is what the adapter changes."""
    from tests.tiny_checkpoints import save_any

    base = save_any("qwen3_moe", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    experts = "model.layers.0.mlp.experts."
    broken = rename_in_adapter(
        adapter, tmp_path / "broken", "model.layers.0.self_attn.q_proj", f"{experts}gate_up_proj"
    )
    with refused("adapter-unfit", "merge_and_unload"):
        open_checkpoint(f"{base}+{broken}")


def test_of_another_shape(bases, tmp_path):
    adapter = save_adapter(bases["llava"], tmp_path / "adapter", target_modules=["down_proj"])

    def widen(stored):
        for name, value in stored.items():
            stored[name] = value.repeat(1, 2) if "lora_A" in name else value

    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    edit_tensors(adapter, widen)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    with refused("adapter-unfit"):
        open_checkpoint(f"{bases['llava']}+{adapter}")
