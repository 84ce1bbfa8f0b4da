"""How far an expert is from its base: known changes, a sample that is small, every command's warning.

python -m pytest tests/models/test_relative_change.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands_here import done_here
from tests.tiny_checkpoints import save_tiny
from tests.tiny_merges import recipe, write_recipe
from tests.tiny_pairs import save_pair
from utils.models.opening import open_checkpoint
from utils.models.relative_change import no_fine_tune, relative_changes, strangers
from utils.models.tensor_files import TensorFiles


def changed(base: Path, folder: Path, change) -> Path:
    """A copy of a model with `change(name, tensor)` in the place of its tensors."""
    save_tiny("llama", folder)
    stored = load_file(base / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in stored.items()}, folder / "model.safetensors")
    return folder


def test_the_change_of_each_group_of_matrices(tmp_path):
    base = save_tiny("llama", tmp_path / "base")

    def half_of_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return tensor * 3  # norms do as they like
        return tensor * 1.5 if "up_proj" in name else tensor * 1.25

    expert = changed(base, tmp_path / "expert", half_of_one)
    found = relative_changes(open_checkpoint(str(base)), open_checkpoint(str(expert)))
    assert found[0].group == "model.layers.*.mlp.up_proj.weight"
    assert found[0].change == pytest.approx(0.5, rel=0.01)
    assert {one.group for one in found} >= {"model.embed_tokens.weight", "model.layers.*.self_attn.q_proj.weight"}
    assert all(one.change == pytest.approx(0.25, rel=0.01) for one in found[1:])
    assert not any("norm" in one.group for one in found)


def test_models_trained_apart_are_named_group_by_group_and_fine_tunes_are_not(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    save_tiny("llama", tmp_path / "other", seed=5)
    near = changed(base, tmp_path / "near", lambda name, tensor: tensor * 1.1)
    opened = {name: open_checkpoint(str(tmp_path / name)) for name in ("base", "other", "near")}
    (line,) = no_fine_tune(opened["base"], opened["other"], "other")
    assert "model.layers.*.mlp.up_proj.weight 1." in line and "model.embed_tokens.weight" in line
    assert no_fine_tune(opened["base"], open_checkpoint(str(near)), "near") == []
    assert strangers(opened, "base", ["near", "other", "absent"]) == [line]
    assert strangers(opened, "absent", ["near", "other"]) == []


def test_few_bytes_are_read_however_many_blocks_there_are(tmp_path, monkeypatch):
    base = open_checkpoint(str(save_tiny("llama", tmp_path / "base", layers=24)))
    read = []
    whole = TensorFiles.read

    def counted(self, header, start, out):
        read.append(header.name)
        return whole(self, header, start, out)

    monkeypatch.setattr(TensorFiles, "read", counted)
    relative_changes(base, base)
    assert 0 < len({name for name in read if "up_proj" in name}) <= 6


def test_every_command_warns_before_work(tmp_path):
    """Models of other seeds are no fine-tunes of each other."""
    save_pair(tmp_path, layers=3)
    made = write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    few = "--validation_rows 4 --test_rows 4 --no-samples --no-controls"
    for line in (
        "lewis_importance.py --config pair.yaml --out_dir out/deltas",
        "lewis_merge.py --config_file pair.yaml --delta_dfs_in_dir out/deltas --out_dir out/recipes",
        f"utils/merger.py --merge_config {made} --output_path m",
        f"utils/evaluator.py --config pair.yaml --out_dir out/evaluation {few}",
    ):
        said = done_here(*line.split(), cwd=tmp_path).stderr
        assert said.count("does not look like a fine-tune of") == 2, (line, said)
