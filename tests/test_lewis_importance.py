"""Command 1 as a user meets it: what it writes, and how it refuses, stops and is stopped.

python -m pytest tests/test_lewis_importance.py
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.commands_here import done_here, refused_here, run_here
from tests.conftest import ROOT
from tests.refusals import refusal_code
from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import BOS_CHAT, contents, pair_settings, save_tokenizer, write_config

SCRIPT = "lewis_importance.py"
COMPONENTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARGUMENTS = ("--config", "pair.yaml", "--out_dir", "out/deltas")
WRITTEN = {"code_delta.csv", "math_delta.csv", "norms.csv", "lewis_noise.csv", "manifest.json"}


def refuses(code: str, *arguments: object) -> str:
    """The command refuses with this code and changes nothing; its message."""
    return refused_here(code, SCRIPT, *(arguments or ARGUMENTS))


@pytest.fixture
def refused(pair, unread) -> Callable[..., str]:
    """As `refuses`, before weights are read."""
    return refuses


def measure(*extra: object, out: str = "out/deltas") -> subprocess.CompletedProcess:
    return done_here(SCRIPT, "--config", "pair.yaml", "--out_dir", out, *extra)


# --- what it does -----------------------------------------------------------------------------------------------------


def test_measures_says_what_it_chose_and_what_comes_next(pair):
    before = contents(pair)
    ended = measure()
    after = contents(pair)
    assert {name for name in after if name not in before} == {
        "out",
        "out/deltas",
        *(f"out/deltas/{n}" for n in WRITTEN),
    }
    assert all(after[name] == content for name, content in before.items())
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("versions: python 3")
    assert lines[1].startswith("device: ")
    assert lines[2].startswith("guidance: lewis, ")
    assert lines[3] == "text: 4 samples of rows.jsonl, seed 42, at most 32 tokens"
    assert lines[4] == f"components: {', '.join(COMPONENTS)} (every linear part of a block)"
    assert "4 samples" in ended.stdout and "memory: about" in ended.stdout
    proposed = ended.stdout.partition("next:\n")[2].replace("\\\n", " ").split()
    assert Path(proposed[1]).resolve() == ROOT / "lewis_merge.py"
    assert proposed[2:] == [
        *("--delta_dfs_in_dir", "out/deltas", "--config_file", "pair.yaml", "--out_dir", "out/merge_configs"),
        *("--merge_method", "ties", "--gamma", "0.3", "--epsilon", "0.8", "--lambda", "0.4"),
    ]
    warnings = [line for line in ended.stderr.splitlines() if "warning" in line]  # the pair is random
    assert all("does not look like a fine-tune" in line for line in warnings)
    assert "error:" not in ended.stderr and "block" in ended.stderr


def test_quiet_leaves_warnings_and_the_last_lines(pair):
    (pair / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    ended = measure("--quiet")
    assert ended.stdout.startswith("wrote out/deltas/") and ended.stdout.splitlines()[1] == "next:"
    assert ended.stderr and all(line.startswith("warning: ") for line in ended.stderr.splitlines())


def test_tokens_are_counted_by_text(pair):
    texts = {name: {"path": "rows.jsonl", "text": f"{{{name}}}"} for name in ("question", "answer")}
    write_config(pair, {"calibration": {"code": texts["answer"], "math": texts["question"]}})
    lines = measure().stdout.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("base: ./base"))
    base, code = lines[place + 1 : place + 3], lines[place + 4]
    assert [line.split(":")[0] for line in base] == ["  on the text for code", "  on the text for math"]
    assert base[0] == code and base[0].split(": ")[1] != base[1].split(": ")[1]
    counts = json.loads((pair / "out/deltas/manifest.json").read_text())["models"][0]["tokens"]
    assert sum(int(line.split(": ")[1].split()[0]) for line in base) == counts


def test_the_next_command_can_be_pasted_whatever_the_paths(pair):
    out = measure(out="my out; rm -rf $HOME/it's").stdout
    assert "--delta_dfs_in_dir 'my out; rm -rf $HOME/it'\"'\"'s'" in out


def test_the_manifest_says_where_the_numbers_come_from(pair):
    measure("--dtype", "float32", "--device", "cpu")
    manifest = json.loads((pair / "out/deltas/manifest.json").read_text())
    assert [model["type"] for model in manifest["models"]] == ["base", "code", "math"]
    for model in manifest["models"]:
        assert model["dtype"] == "float32"
        assert model["files"]["model.safetensors"] == (pair / model["name"] / "model.safetensors").stat().st_size
    assert len(manifest["samples"]["rows"]) == 4 and manifest["samples"]["split"] is None
    assert manifest["device"] == "cpu"
    assert str(pair) not in json.dumps(manifest)  # no path of this machine beyond those the user gave
    assert set(manifest["files"]) == WRITTEN - {"manifest.json"}


def test_the_same_request_again_is_done_at_once(pair, monkeypatch):
    measure()
    before = {name: (pair / "out/deltas" / name).stat().st_mtime_ns for name in WRITTEN}
    monkeypatch.setattr("utils.models.weight_source.StreamedWeights.fetch", None)  # not needed
    ended = measure()
    assert "out/deltas already holds exactly this measurement; nothing to do" in ended.stdout
    assert "lewis_merge.py --delta_dfs_in_dir out/deltas" in ended.stdout
    assert {name: (pair / "out/deltas" / name).stat().st_mtime_ns for name in WRITTEN} == before


@pytest.mark.parametrize("change", ["config", "weights", "text", "an edited table", "a missing table"])
def test_another_request_needs_overwrite(pair, monkeypatch, change):
    measure()
    table = pair / "out/deltas/code_delta.csv"
    if change == "config":
        write_config(pair, {"nsamples": 3})
    elif change == "weights":
        save_tiny("llama", pair / "code", seed=9, layers=2)
    elif change == "text":
        (pair / "rows.jsonl").write_text((pair / "rows.jsonl").read_text().replace("It is", "It was"))
    elif change == "an edited table":
        table.write_text(table.read_text().replace("0.", "1."))
    else:
        table.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("utils.models.weight_source.StreamedWeights.fetch", None)  # not needed
        refuses("out-exists")
    assert "wrote out/deltas/code_delta.csv" in measure("--overwrite").stdout


def test_another_config_in_the_folder_is_refused_before_the_libraries_load(pair, monkeypatch):
    measure()
    write_config(pair, {"nsamples": 3})
    monkeypatch.setattr("utils.commands.measure.quiet_libraries", None)
    assert "code_delta.csv, math_delta.csv, norms.csv, lewis_noise.csv, manifest.json" in refuses("out-exists")


def test_files_of_others_in_the_folder_stay(pair):
    folder = pair / "out/deltas"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    measure()
    measure("--overwrite")
    assert {path.name for path in folder.iterdir()} == {*WRITTEN, "notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"


def test_doubts_are_warnings(pair):
    (pair / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    edit_json(pair / "code/config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    save_tokenizer(pair / "math", bos=False)
    err = measure().stderr
    assert "warning: all 4 samples are the same 4 tokens" in err
    assert "warning: the longest sample has 4 tokens" in err
    assert "warning: ./code rotates positions differently from the base" in err
    assert "warning: ./math and the base split the text into different tokens" in err


def test_a_copy_of_the_base_is_measured_with_a_warning(pair):
    shutil.rmtree(pair / "code")
    shutil.copytree(pair / "base", pair / "code")
    ended = measure()
    assert "warning: ./code has exactly the base's norms everywhere; is it the same model?" in ended.stderr
    assert set((pair / "out/deltas/code_delta.csv").read_text().split("\n")[1].split(",")) == {"0.0"}


def test_text_from_chat(pair):
    rows = [{"m": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Ho"}]} for i in range(5)]
    (pair / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("base", "code", "math"):
        save_tokenizer(pair / name, chat_template=BOS_CHAT)
    write_config(pair, {"dataset": {"path": "chat.jsonl", "messages": "m", "seqlen": 64}})
    assert "first ids [0, 31," in measure().stdout  # one BOS, then '<'


def test_differences_that_do_not_matter(pair):
    """Another vocabulary size, dtype and tied head; a tokenizer without special tokens; a layer of zeros."""
    from safetensors.torch import load_file, save_file

    save_tiny("llama", pair / "code", seed=1, layers=2, vocab_size=100, tie_word_embeddings=True)
    tensors = {name: tensor.float() for name, tensor in load_file(pair / "code/model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, pair / "code/model.safetensors", metadata={"format": "pt"})
    for name in ("base", "code", "math"):
        edit_json(pair / name / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
    ended = measure()
    assert (
        "code: ./code, LlamaForCausalLM, 2 blocks, " in ended.stdout
        and "float32 (the checkpoint's own)" in ended.stdout
    )
    norms = (pair / "out/deltas/norms.csv").read_text()
    assert "code,1,up_proj,model.layers.1.mlp.up_proj.weight,0.0,1536" in norms


# --- refused: the config file -----------------------------------------------------------------------------------------


def test_config_files_that_are_none(pair, refused):
    (pair / "empty.yaml").touch()
    (pair / "list.yaml").write_text("- a\n")
    (pair / "tag.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{pair / 'made'}]\n")
    (pair / "twice.yaml").write_text("nsamples: 1\nnsamples: 2\n")
    for name, code in {
        "none.yaml": "file-missing",
        "base": "file-is-folder",
        "empty.yaml": "yaml-empty",
        "list.yaml": "yaml-no-mapping",
        "tag.yaml": "yaml-invalid",
        "twice.yaml": "yaml-key-twice",
        "/dev/zero": "file-too-large",
    }.items():
        assert f"pair config {name}" in refused(code, "--config", name, "--out_dir", "out")


def test_problems_of_the_config_are_reported_together(pair, refused):
    write_config(pair, {"nsample": 3, "sparsity_ratio": 50})
    said = refused("several")
    assert "did you mean 'nsamples'?" in said and "50% is 0.5" in said


# --- refused: flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--overwrite",), "flag-invalid", "the following arguments are required: --config, --out_dir"),
        (("--config", "pair.yaml"), "flag-invalid", "the following arguments are required: --out_dir"),
        (("--config", "pair.yaml", "--outdir", "out"), "flag-unknown", "'--outdir'; did you mean --out_dir?"),
        ((*ARGUMENTS, "--out-dir", "other"), "flag-twice", "--out_dir"),
        ((*ARGUMENTS, "--overwrite", "maybe"), "flag-invalid", "'maybe' is neither True nor False"),
        ((*ARGUMENTS, "--trust_remote_code", "yess"), "flag-invalid", "--trust_remote_code"),
        ((*ARGUMENTS, "--device", "mps"), "device-unknown", "'mps' is not supported; use auto, cpu, cuda or cuda:n"),
        ((*ARGUMENTS, "--device", "gpu"), "device-unknown", "'gpu' is unknown; use auto, cpu, cuda or cuda:n"),
        ((*ARGUMENTS, "--device", ""), "device-unknown", ""),
        ((*ARGUMENTS, "--device", "cuda:99"), "device-missing", ""),
        ((*ARGUMENTS, "--dtype", "fp16"), "flag-invalid", "invalid choice: 'fp16'"),
        ((*ARGUMENTS, "--micro_batch_tokens", "0"), "flag-invalid", "0 is outside [1, "),
        ((*ARGUMENTS, "--micro_batch_tokens", "1e3"), "flag-invalid", "'1e3' is not a whole number"),
        (("--config", "", "--out_dir", "out"), "flag-invalid", "the path is empty"),
        (("--config", "pair.yaml", "--out_dir", " "), "flag-invalid", "the path is empty"),
        (("--config", "pair.yaml", "--out_dir", "~no_such_user/x"), "flag-invalid", "no such user's home folder"),
        (("--config", "pair.yaml", "--out_dir", "rows.jsonl"), "out-is-file", "rows.jsonl"),
        (("--config", "pair.yaml", "--out_dir", "pair.yaml/x"), "out-is-file", "pair.yaml"),
        (("--config", "pair.yaml", "--out_dir", "x" * 300), "out-unusable", "--out_dir"),
        (("--config", "pair.yaml", "--out_dir", "./code"), "out-dir-is-model", "./code"),
    ],
)
def test_flags(refused, flags, code, words):
    assert words in refused(code, *flags)


def test_device_cuda_without_a_gpu(refused):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused("device-missing", *ARGUMENTS, "--device", "cuda")


def test_an_out_dir_that_cannot_be_written(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("out-unwritable")


def test_something_that_is_no_file_in_the_way(pair, refused):
    (pair / "out/deltas/norms.csv").mkdir(parents=True)
    for more in ((), ("--overwrite",)):
        assert "norms.csv" in refused("out-in-the-way", *ARGUMENTS, *more)


def test_a_manifest_that_is_broken(pair, refused):
    (pair / "out/deltas").mkdir(parents=True)
    (pair / "out/deltas/manifest.json").write_text("{")
    refused("manifest-unreadable")


# --- refused: models --------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def retype(folder: Path, tensor: str, dtype: str) -> None:
    """Store one tensor in another dtype, as a quantized checkpoint does."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = tensors[tensor].to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(folder: Path, tensor: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def use_family(pair: Path, family: str, **overrides) -> None:
    save_tiny(family, pair / "code", layers=2, **overrides)


def weights_only(pair: Path, *names: str) -> None:
    for name in names:
        (pair / "code" / name).unlink()


def shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "x.safetensors"}}')


Q0 = "model.layers.0.self_attn.q_proj.weight"
MODELS = {
    "no folder": (lambda pair: shutil.rmtree(pair / "code"), "model-missing", ""),
    "no config": (lambda pair: weights_only(pair, "config.json"), "model-no-config", ""),
    "broken config": (lambda pair: (pair / "code/config.json").write_text("{"), "json-invalid", ""),
    "no architecture": (lambda pair: edit_json(pair / "code/config.json", architectures=None), "model-no-architecture", ""),
    "unknown model type": (lambda pair: edit_json(pair / "code/config.json", model_type="novel"), "model-not-buildable", ""),
    "remote code": (
        lambda pair: edit_json(pair / "code/config.json", model_type="novel", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}),
        "model-not-buildable",
        "",
    ),
    "quantized": (lambda pair: edit_json(pair / "code/config.json", quantization_config={"quant_method": "awq"}), "model-quantized", "model ./code is quantized (awq)"),
    "encoder-decoder": (lambda pair: edit_json(pair / "code/config.json", is_encoder_decoder=True), "model-encoder-decoder", ""),
    "only GGUF": (lambda pair: (pair / "code/model.safetensors").rename(pair / "code/m.gguf"), "model-format", "only m.gguf"),
    "only pickles": (lambda pair: (pair / "code/model.safetensors").rename(pair / "code/pytorch_model.bin"), "model-format", "pickled weights can run code"),
    "an adapter": (lambda pair: (pair / "code/model.safetensors").rename(pair / "code/adapter_model.safetensors") and (pair / "code/adapter_config.json").write_text("{}"), "model-is-adapter", ""),
    "truncated": (lambda pair: os.truncate(pair / "code/model.safetensors", 3000), "weights-truncated", ""),
    "a huge header": (lambda pair: (pair / "code/model.safetensors").write_bytes(struct.pack("<Q", 2**37) + bytes(99)), "weights-truncated", ""),
    "a stale index": (lambda pair: (pair / "code/model.safetensors.index.json").write_text("{}"), "model-two-weights", ""),
    "a link to itself": (lambda pair: weights_only(pair, "model.safetensors") or (pair / "code/model.safetensors").symlink_to("model.safetensors"), "weights-missing", ""),
    "an integer weight": (lambda pair: retype(pair / "code", Q0, "int8"), "model-quantized", f"tensor {Q0} is stored as I8, not as floating-point numbers"),
    "an fp8 weight": (lambda pair: retype(pair / "code", Q0, "float8_e4m3fn"), "model-quantized", f"tensor {Q0} is stored as F8_E4M3"),
    "an integer norm": (lambda pair: retype(pair / "code", "model.norm.weight", "int32"), "model-quantized", "tensor model.norm.weight is stored as I32"),
    "fewer layers": (lambda pair: save_tiny("llama", pair / "code", layers=1), "model-not-of-base", "is no fine-tune of the base ./base, so they cannot be compared: 1 decoder blocks against 2"),
    "wider": (lambda pair: use_family(pair, "llama", intermediate_size=64), "model-not-of-base", "gate_proj.weight is [64, 32] against [48, 32]"),
    "other heads": (lambda pair: use_family(pair, "llama", num_attention_heads=2, num_key_value_heads=1, head_dim=16), "model-not-of-base", "num_attention_heads is 2 against 4"),
    "another type": (lambda pair: use_family(pair, "qwen2"), "model-not-of-base", "model_type is qwen2 against llama"),
    "a config of other shapes": (lambda pair: edit_json(pair / "code/config.json", intermediate_size=64), "model-shape", ""),
    "zero heads": (lambda pair: edit_json(pair / "code/config.json", num_attention_heads=0), "model-config-value", ""),
    "a size that is text": (lambda pair: edit_json(pair / "code/config.json", hidden_size="wide"), "model-config-value", ""),
    "a million layers": (lambda pair: edit_json(pair / "code/config.json", num_hidden_layers=10**6, layer_types=None), "model-config-value", "from 1 to 10000, got 1000000"),
    "more layers than tensors": (lambda pair: edit_json(pair / "code/config.json", num_hidden_layers=999, layer_types=None), "model-config-value", "num_hidden_layers is 999, but the weights hold 2"),
    "a negative size": (lambda pair: edit_json(pair / "code/config.json", intermediate_size=-1), "model-config-value", ""),
    "no tokenizer": (lambda pair: weights_only(pair, "tokenizer.json", "tokenizer_config.json"), "tokenizer-unreadable", ""),
    "half a tokenizer": (lambda pair: weights_only(pair, "tokenizer.json"), "tokenizer-unreadable", ""),
    "a broken tokenizer": (lambda pair: (pair / "code/tokenizer.json").write_text("{"), "tokenizer-unreadable", ""),
    "a tokenizer of another model": (lambda pair: use_family(pair, "llama", vocab_size=40), "tokenizer-other-model", ""),
    "the same folder twice": (lambda pair: (shutil.rmtree(pair / "code"), (pair / "code").symlink_to("base")), "model-twice", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_refused_before_weights_are_read(pair, refused, case):
    change, code, words = MODELS[case]
    change(pair)
    said = refused(code)
    assert words in said and "./code" in said


@pytest.mark.parametrize("family", ["gemma", "gpt2", "qwen2"])
def test_a_tokenizer_that_transformers_would_make_up(pair, refused, family):
    """For these types transformers builds a tokenizer without a vocabulary where there are no files."""
    for name in ("base", "code", "math"):
        shutil.rmtree(pair / name)
        save_tiny(family, pair / name, layers=1)
    refused("tokenizer-missing")


def test_other_kinds_of_models(pair, refused):
    from transformers import AutoConfig, AutoModelForMaskedLM

    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    for model_type, auto, code in (("bert", AutoModelForMaskedLM, "model-encoder"),):
        for name in ("base", "code", "math"):
            shutil.rmtree(pair / name)
            auto.from_config(AutoConfig.for_model(model_type, **small)).save_pretrained(pair / name)
            save_tokenizer(pair / name)
        refused(code)


def test_hub_ids_that_are_not_here(pair, refused):
    models = [{"name": "nobody/base", "type": "base"}, {"name": "./code", "type": "code"}]
    write_config(pair, {"model_info": models})
    assert "nobody/base" in refused("hub-offline")
    write_config(pair, {"model_info": [{**models[0], "name": "no such id"}, models[1]]})
    refused("hub-bad-name")
    write_config(pair, {"model_info": [{"name": "./base", "type": "base", "revision": "v1"}, models[1]]})
    refused("model-revision")


def test_components_that_the_models_do_not_have(pair, refused):
    write_config(pair, {"components": ["q_proj", "c_proj"]})
    assert "they have self_attn.q_proj" in refused("component-unknown")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(pair, value):
    poison(pair / "code", Q0, value)
    assert "model ./code: the norm of model.layers.0." in refuses("measured-not-finite")


def test_an_overflow_names_the_dtype(pair):
    poison(pair / "code", "model.embed_tokens.weight", 1e30)
    (pair / "rows.jsonl").write_text('{"question": "<s>", "answer": "x"}\n' * 4)
    assert "--dtype float32 or bfloat16" in refuses("measured-not-finite", *ARGUMENTS, "--dtype", "float16")


def test_a_model_that_changes_while_it_is_measured(pair, monkeypatch):
    from utils.guidance.measure_job import MeasureJob

    run = MeasureJob.run

    def run_and_touch(*args):
        results = run(*args)
        os.utime(pair / "math/model.safetensors", ns=(1, 1))
        return results

    monkeypatch.setattr(MeasureJob, "run", run_and_touch)
    assert "./math" in refuses("model-changed")


# --- refused: text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "code"),
    [
        ({"path": "none.jsonl"}, "text-missing"),
        ({"path": "pair.yaml"}, "text-kind"),
        ({"path": "https://example.org/x.jsonl"}, "text-url"),
        ({"path": "rows.jsonl"}, "text-no-column"),
        ({"path": "rows.jsonl", "text": "{quest}"}, "text-no-column"),
        ({"path": "rows.jsonl", "text": "{}"}, "template-invalid"),
        ({"path": "rows.jsonl", "messages": "question"}, "text-bad-messages"),
        ({"path": "rows.jsonl", "text": "{question}", "split": "test"}, "text-key-of-file"),
        ({"path": "rows.jsonl", "text": "{question}", "seqlen": 999}, None),  # samples are shorter than the positions
        ({"name": "gsm8k"}, "text-not-loadable"),
        ("mbpp", "text-not-loadable"),
    ],
)
def test_data_sets(pair, dataset, code):
    write_config(pair, {"dataset": dataset})
    if code is None:
        measure()
    else:
        refuses(code)


def test_fewer_rows_than_samples(pair, refused):
    write_config(pair, {"nsamples": 15})
    refused("text-too-few-rows")


def test_samples_longer_than_the_model_can_take(pair, refused):
    (pair / "rows.jsonl").write_text(json.dumps({"question": "x" * 500, "answer": ""}) + "\n")
    write_config(pair, {"nsamples": 1, "dataset": {**pair_settings()["dataset"], "seqlen": 100}})
    refused("text-too-long")


def test_parity_needs_an_end_token(pair, refused):
    for name in ("base", "code", "math"):
        edit_json(pair / name / "tokenizer_config.json", eos_token=None)
    write_config(pair, {"parity": "reference"})
    refused("tokenizer-no-eos")


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "at"), [("fsync", 1), ("fsync", 4), ("replace", 1), ("replace", 4)])
def test_a_disk_that_fills_up_at_the_end(pair, monkeypatch, call, at):
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    assert refuses("os-error") == "error: No space left on device; nothing unfinished was left behind [os-error]\n"


# --- fuzz: only success or one message --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_fuzz_the_small_files_of_a_model(pair, name):
    """A fixed-seed mutator: values of the JSON are replaced or dropped."""
    import random

    import torch

    from utils.errors import UserError
    from utils.pair.config import read_pair_config
    from utils.pair.sample_text import Sample
    from utils.passes.preparation import Precision, prepare_subjects

    config, precision = read_pair_config(pair / "pair.yaml"), Precision(torch.device("cpu"), "auto", None)
    path = pair / "code" / name
    valid = json.loads(path.read_text())
    junk = [
        None,
        True,
        0,
        -1,
        1,
        3,
        10**6,
        0.5,
        float("nan"),
        "",
        "x",
        "llama",
        [],
        {},
        [1],
        {"a": 1},
        "float16",
        2**70,
    ]
    choose = random.Random(name)
    outcomes = set()
    for _ in range(60):
        data = json.loads(json.dumps(valid))
        inner = data
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = choose.choice(keys)
            if isinstance(inner[key], (dict, list)) and inner[key] and choose.random() < 0.7:
                inner = inner[key]
                continue
            if choose.random() < 0.2:
                del inner[key]
            else:
                inner[key] = choose.choice(junk)
            break
        path.write_text(json.dumps(data))
        try:
            prepare_subjects(config, {config.dataset: [Sample(0, "What is 3 and 4?")]}, precision, False)
            outcomes.add("fine")
        except UserError as error:
            assert len(str(error)) < 3000
            outcomes.add("refused")
    assert outcomes == {"fine", "refused"}  # the mutator is neither idle nor blunt


# --- real processes ---------------------------------------------------------------------------------------------------


def test_help_and_mistakes_answer_without_the_heavy_libraries(pair, run_command_line):
    models = [{"name": "./base", "type": "base"}, {"name": "./gone", "type": "code"}]
    spoiled = {
        "model.yaml": {"model_info": models},
        "adapter.yaml": {"model_info": [models[0], {"name": "base+adapter", "type": "code"}]},
        "text.yaml": {"dataset": {"path": "gone.jsonl"}},
    }
    for name, changes in spoiled.items():
        (pair / name).write_text(yaml.safe_dump({**pair_settings(), **changes}))
    before = contents(pair)
    for arguments, ends in (
        (("--config", "model.yaml", "--out_dir", "out"), "[model-missing]"),
        (("--config", "adapter.yaml", "--out_dir", "out"), "[model-is-adapter]"),
        (("--config", "text.yaml", "--out_dir", "out"), "[text-missing]"),
        (("--help",), ""),
        (("--config", "none.yaml", "--out_dir", "out"), "error: pair config none.yaml does not exist [file-missing]"),
        (("--config", "pair.yaml", "--out_dir", "rows.jsonl"), "[out-is-file]"),
    ):
        command = [sys.executable, "-X", "importtime", str(ROOT / SCRIPT), *arguments]
        ended = subprocess.run(command, cwd=pair, capture_output=True, text=True, timeout=60)
        assert ended.returncode == (2 if ends else 0)
        imported = {
            line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")
        }
        assert not {"torch", "transformers", "pandas", "numpy", "datasets"} & imported
        said = "".join(line for line in ended.stderr.splitlines(True) if not line.startswith("import time"))
        assert said.endswith(f"{ends}\n" if ends else "") and "Traceback" not in said
    assert contents(pair) == before


PLAIN = f"""
import sys, runpy
sys.argv = [{SCRIPT!r}, *sys.argv[1:]]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / SCRIPT)!r}, run_name="__main__")
"""
# Waits inside the first block, so that a signal finds the command at work.
WAITING = f"""
import sys, time, tqdm

def wait(self, *args):
    print("AT WORK", file=sys.stderr, flush=True)
    time.sleep(120)

tqdm.tqdm.update = wait
{PLAIN}"""
# No network: whatever reaches for it fails.
BARE = f"""
import socket

def refuse(*args):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
{PLAIN}"""


def start(pair: Path, code: str, out: str, shell: str = 'exec "$0" -c "$@"', **changes: str | None) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LC_", "LANG"))}
    environment = {key: value for key, value in {**kept, **changes}.items() if value is not None}
    return subprocess.Popen(
        ["bash", "-c", shell, sys.executable, code, "--config", "pair.yaml", "--out_dir", out],
        cwd=pair,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, words: str) -> str:
    seen = ""
    while words not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    return seen


def ended_by(process: subprocess.Popen, name: str) -> str:
    process.send_signal(getattr(signal, name))
    return process.communicate(timeout=60)[1]


def assert_unwound(pair: Path, process: subprocess.Popen, err: str, out: str, signum: int = signal.SIGINT) -> None:
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted; nothing unfinished was left behind")
    assert not (pair / out).exists()


def test_interrupted_killed_crowded_and_bare(pair):
    """Three runs at once, each in a process of its own, because starting one takes seconds."""
    before = contents(pair)
    interrupted = start(pair, WAITING, "interrupted/deep")
    killed = start(pair, WAITING, "killed/deep")
    bare = start(
        pair, BARE, "bare", HOME=None, HF_HOME="/proc/1/nowhere", PYTHONHASHSEED="7",
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    try:
        said = wait_for(interrupted, "AT WORK")
        wait_for(killed, "AT WORK")
        crowded = run_here(SCRIPT, "--config", "pair.yaml", "--out_dir", "interrupted/deep", "--dtype", "bfloat16")
        assert refusal_code(crowded) == "out-in-use"
        assert_unwound(pair, interrupted, said + ended_by(interrupted, "SIGINT"), "interrupted")
        ended_by(killed, "SIGKILL")
        err = bare.communicate(timeout=120)[1]
        assert bare.returncode == 0, err
        assert "Traceback" not in err
        warnings = [line for line in err.splitlines() if "warning" in line.lower()]  # the pair is random
        assert all("does not look like a fine-tune" in line for line in warnings)
    finally:
        for process in (interrupted, killed, bare):
            process.kill()
    assert [path.name for path in (pair / "killed/deep").iterdir()] == [".measuring.part"]
    measure(out="killed/deep")  # nothing is in the way after a kill
    assert {path.name for path in (pair / "killed/deep").iterdir()} == WRITTEN
    ours = {name: (pair / "killed/deep" / name).read_bytes() for name in WRITTEN}
    assert {name: (pair / "bare" / name).read_bytes() for name in WRITTEN} == ours
    now = contents(pair)
    assert {name: now[name] for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_termination_is_an_interrupt(pair, name):
    process = start(pair, WAITING, "out")
    try:
        said = wait_for(process, "AT WORK") + ended_by(process, name)
        assert_unwound(pair, process, said, "out", getattr(signal, name))
    finally:
        process.kill()


@pytest.mark.slow
def test_a_reader_that_goes_away(pair):
    process = start(pair, BARE, "out", '"$0" -c "$@" | head -n 1')
    out, err = process.communicate(timeout=120)
    assert out.startswith("versions: ") and out.count("\n") == 1
    assert "Traceback" not in err and "BrokenPipe" not in err


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.1, 0.3, 0.7, 1.2, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_any_time_leaves_all_or_nothing(pair, name, delay):
    process = start(pair, PLAIN, "out", HF_HUB_OFFLINE="1")
    time.sleep(delay)
    err = ended_by(process, name)
    made = {path.name for path in (pair / "out").iterdir()} if (pair / "out").exists() else set()
    assert made in (set(), WRITTEN)
    # Before the command has begun (the interpreter still starts) the signal has its usual effect.
    assert process.returncode in (0, 128 + getattr(signal, name), -getattr(signal, name), 1)
    if process.returncode >= 128:
        assert "Traceback" not in err
