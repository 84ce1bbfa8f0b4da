"""Quantized weights are refused by their headers, in every command, with a conversion that works."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.tiny_checkpoints import save_tiny
from utils.models.opening import open_checkpoint

FP8 = torch.float8_e4m3fn


def rewritten(folder: Path, change) -> Path:
    """A tiny model whose projections are written by `change(name, value)`, as tensors by name."""
    save_tiny("llama", folder)
    file = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        tensors |= change(name, value) if "proj" in name else {name: value}
    save_file(tensors, file, {"format": "pt"})
    return folder


def scaled(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = value.float().abs().max() / 448
    return {name: (value.float() / scale).to(FP8), f"{name}_scale_inv": scale.reshape(1, 1)}


@pytest.mark.parametrize(
    "change",
    [
        lambda name, value: {name: value.to(FP8)},
        lambda name, value: {name: value.to(torch.float8_e5m2)},
        scaled,
        lambda name, value: {name: (value * 100).to(torch.int8)},
    ],
    ids=["e4m3", "e5m2", "scaled", "int8"],
)
def test_refused_without_a_word_in_config_json(tmp_path, change):
    with refused("model-quantized"):
        open_checkpoint(str(rewritten(tmp_path, change)))


def test_one_tensor_is_enough(tmp_path):
    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    last = sorted(tensors)[-1]
    save_file({**tensors, last: tensors[last].to(FP8)}, tmp_path / "model.safetensors", {"format": "pt"})
    with refused("model-quantized", f"{last} is stored as F8_E4M3"):
        open_checkpoint(str(tmp_path))


def test_the_conversion_without_scales_gives_the_stored_numbers(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = rewritten(tmp_path / "fp8", lambda name, value: {name: value.to(FP8)})
    with refused("model-quantized", "dtype='bfloat16'"):
        open_checkpoint(str(folder))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "converted")
    open_checkpoint(str(tmp_path / "converted"))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "converted" / "model.safetensors")
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before)


def test_the_conversion_of_scaled_numbers_needs_the_config_back(tmp_path):
    import json

    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = rewritten(tmp_path / "fp8", scaled)
    with refused("model-quantized", "with the publisher's quantization_config"):
        open_checkpoint(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    asked = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=asked)
    model.save_pretrained(tmp_path / "converted")
    open_checkpoint(str(tmp_path / "converted"))
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(folder / "model.safetensors")
    wanted = stored[name].float() * stored[f"{name}_scale_inv"]
    assert torch.allclose(load_file(tmp_path / "converted" / "model.safetensors")[name].float(), wanted, rtol=2**-7)


def test_masks_of_old_versions_are_no_weights(tmp_path):
    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file({**tensors, "model.layers.0.mask": mask}, tmp_path / "model.safetensors", {"format": "pt"})
    open_checkpoint(str(tmp_path))
