"""Adapters as changes of a checkpoint's tensors: the numbers of peft's own merge, piece by piece, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.tiny_adapters import in_float32, save_adapter, save_merged
from tests.tiny_checkpoints import resave, save_tiny
from utils.models.checkpoints import find_small_files
from utils.models.opening import open_checkpoint, open_without_download
from utils.models.tensor_files import TensorFiles, stored_dtype

KINDS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True, "r": 4, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7}},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "a head of its own": {"modules_to_save": ["lm_head"]},
}


def read_all(name: str) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(name)
    with TensorFiles(checkpoint.files) as files:
        return {name: files.read_whole(header) for name, header in checkpoint.tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_peft(tmp_path, kind):
    base = in_float32(save_tiny("llama", tmp_path / "base"))
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    ours, wanted = (
        read_all(f"{base}+{adapter}"),
        load_file(save_merged(base, adapter, tmp_path / "m") / "model.safetensors"),
    )
    plain = read_all(str(base))
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(ours[name], plain[name]) for name in plain)


def test_transposed_matrices(tmp_path):
    base = in_float32(save_tiny("gpt2", tmp_path / "base"))
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    ours, wanted = (
        read_all(f"{base}+{adapter}"),
        load_file(save_merged(base, adapter, tmp_path / "m") / "model.safetensors"),
    )
    for name, value in ours.items():
        torch.testing.assert_close(value, wanted.get(name, wanted.get(f"transformer.{name}")), rtol=1e-5, atol=1e-6)


def test_sums_are_rounded_once(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    name = "model.layers.1.mlp.down_proj.weight"
    low = load_file(adapter / "adapter_model.safetensors")
    a, b = (low[f"base_model.{name.removesuffix('weight')}lora_{end}.weight".replace("base_model.", "base_model.model.")]
            for end in "AB")  # fmt: skip
    alpha, rank = (json.loads((adapter / "adapter_config.json").read_text())[key] for key in ("lora_alpha", "r"))
    exact = load_file(base / "model.safetensors")[name].double() + alpha / rank * (b.double() @ a.double())
    got = read_all(f"{base}+{adapter}")[name]
    assert got.dtype == torch.bfloat16
    assert (got != exact.float().bfloat16()).float().mean() < 0.001  # but for ties that float32 decides


@pytest.mark.parametrize("kind", ["plain", "dora", "embedding"])
def test_a_stretch_is_a_stretch_of_the_whole(tmp_path, kind):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    with TensorFiles(checkpoint.files) as files:
        for header in checkpoint.tensors.values():
            if header.change is None:
                continue
            whole = files.read_whole(header)
            part = files.read(header, 37, torch.empty(101, dtype=stored_dtype(header)))
            size = part.element_size()
            raw = files.read(header, 37 * size, torch.empty(101 * size, dtype=torch.uint8))  # a stretch of bytes
            assert torch.equal(part, whole.view(-1)[37:138])
            assert torch.equal(raw.view(part.dtype), part)


def test_a_folder_of_an_adapter_names_its_model(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    alone, both = open_checkpoint(str(adapter)), open_without_download(f"{base}+{adapter}")
    assert (alone.folder, alone.adapter, alone.tensors) == (both.folder, both.adapter, both.tensors)
    assert find_small_files(str(adapter)) == find_small_files(f"{base}+{adapter}") == base.resolve()
    assert alone.place != open_checkpoint(str(base)).place


def test_models_of_several_files(tmp_path):
    base = resave(save_tiny("llama", tmp_path / "base"), "20KB")
    adapter = save_adapter(base, tmp_path / "adapter")
    wanted = save_merged(base, adapter, tmp_path / "m")
    (merged,) = [load_file(file) for file in wanted.glob("*.safetensors")]
    for name, value in read_all(f"{base}+{adapter}").items():
        torch.testing.assert_close(value.float(), merged[name], rtol=2**-7, atol=1e-3)


def edited(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED = {
    "another kind": (lambda a: edited(a, peft_type="IA3"), "adapter-unsupported"),
    "pissa": (lambda a: edited(a, init_lora_weights="pissa_niter_4"), "adapter-unsupported"),
    "biases": (lambda a: edited(a, lora_bias=True), "adapter-unsupported"),
    "a regular expression": (lambda a: edited(a, alpha_pattern={"(.+)+q_proj.": 7}), "adapter-unsupported"),
    "a list of patterns": (lambda a: edited(a, alpha_pattern=["q_proj"]), "adapter-unfit"),
    "no dora vectors": (lambda a: edited(a, use_dora=True), "adapter-unsupported"),
    "alpha": (lambda a: edited(a, lora_alpha="much"), "adapter-unfit"),
    "an alpha above all numbers": (lambda a: edited(a, lora_alpha=10**400), "adapter-unfit"),
    "alpha of nothing": (lambda a: edited(a, alpha_pattern={"down_proj": float("nan")}), "adapter-unfit"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter-no-files"),
    "transposed": (lambda a: edited(a, fan_in_fan_out=True), "adapter-unfit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["down_proj"])
    change, code = REFUSED[case]
    change(adapter)
    with refused(code):
        open_checkpoint(f"{base}+{adapter}")


def test_a_tied_embedding_may_be_kept_twice_if_it_is_the_same(tmp_path):
    """As `utils/merger.py --adapter` writes it, for peft."""
    base = save_tiny("gemma3", tmp_path / "base")
    (embedding,) = (name for name in open_checkpoint(str(base)).tensors if name.endswith("embed_tokens.weight"))
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    path = adapter / "adapter_model.safetensors"
    own = load_file(path)
    (whole,) = (value for name, value in own.items() if name.endswith("embed_tokens.weight"))
    head = "base_model.model.lm_head.weight"
    save_file({**own, head: whole.clone()}, path)
    assert open_checkpoint(f"{base}+{adapter}").tensors[embedding].file == path
    save_file({**own, head: whole + 1}, path)
    with refused("adapter-unfit", "lm_head.weight"):
        open_checkpoint(f"{base}+{adapter}")


def test_another_model_s_adapter_is_refused(tmp_path):
    base, other = save_tiny("llama", tmp_path / "base"), save_tiny("gpt2", tmp_path / "other")
    wide = save_tiny("llama", tmp_path / "wide", hidden_size=48)
    adapter = save_adapter(base, tmp_path / "adapter")
    for model in (other, wide):
        with refused("adapter-unfit"):
            open_checkpoint(f"{model}+{adapter}")


def test_names_that_are_none(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    with refused("adapter-name"):
        open_checkpoint(f"{base}+a+b")
    with refused("model-missing"):
        open_checkpoint(f"{base}+{tmp_path / 'nowhere'}")


def test_an_adapter_that_names_itself_as_its_model(tmp_path):
    adapter = save_adapter(save_tiny("llama", tmp_path / "base"), tmp_path / "adapter")
    edited(adapter, base_model_name_or_path=str(adapter))
    with refused("adapter-no-model"):
        open_checkpoint(str(adapter))


def test_lengths_of_another_number_of_rows(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=True)
    file = adapter / "adapter_model.safetensors"
    save_file({name: value[:-1] if "magnitude" in name else value for name, value in load_file(file).items()}, file)
    with refused("adapter-unfit"):
        open_checkpoint(f"{base}+{adapter}")
