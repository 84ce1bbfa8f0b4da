"""What command 1 refuses: config, flags, models and text that cannot be meant, before weights are read.

python -m pytest tests/test_lewis_importance_refusals.py
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.measuring_here import ARGUMENTS, measure, refuses
from tests.tiny_checkpoints import edit_tensors, poison, save_tiny
from tests.tiny_pairs import edit_json, pair_settings, save_tokenizer, write_config
from utils.guidance.method import GuidanceMethod, guidance_methods


@pytest.fixture
def refused(pair, unread) -> Callable[..., str]:
    """As `refuses`, before weights are read."""
    return refuses


# --- the config file -----------------------------------------------------------------------------------------


def test_a_config_that_is_none(pair, refused):
    assert "pair config base" in refused("file-is-folder", "--config", "base", "--out_dir", "out")


def test_problems_of_the_config_are_reported_together(pair, refused):
    write_config(pair, {"nsample": 3, "sparsity_ratio": 50})
    said = refused("several")
    assert "did you mean 'nsamples'?" in said and "50% is 0.5" in said


# --- flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--config", "pair.yaml"), "flag-invalid", "the following arguments are required: --out_dir"),
        ((*ARGUMENTS, "--device", "mps"), "device-unknown", "'mps' is not supported; use auto, cpu, cuda or cuda:n"),
        ((*ARGUMENTS, "--device", "cuda:99"), "device-missing", ""),
        ((*ARGUMENTS, "--dtype", "fp16"), "flag-invalid", "invalid choice: 'fp16'"),
        ((*ARGUMENTS, "--micro_batch_tokens", "0"), "flag-invalid", "0 is outside [1, "),
        (("--config", "pair.yaml", "--out_dir", "rows.jsonl"), "out-is-file", "rows.jsonl"),
        (("--config", "pair.yaml", "--out_dir", "pair.yaml/x"), "out-is-file", "pair.yaml"),
        (("--config", "pair.yaml", "--out_dir", "x" * 300), "out-unusable", "--out_dir"),
        (("--config", "pair.yaml", "--out_dir", "./code"), "out-dir-is-model", "./code"),
    ],
)
def test_flags(refused, flags, code, words):
    assert words in refused(code, *flags)


@pytest.fixture
def full_disk(monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**3))


@pytest.mark.parametrize("guidance", ["lewis", "sens_merging", "saliency_budget", "gram_mean", "tuned"])
def test_a_disk_too_small_for_what_measuring_puts_there(refused, full_disk, monkeypatch, guidance):
    jobs, on_disk = [], GuidanceMethod.on_disk
    monkeypatch.setattr(GuidanceMethod, "on_disk", lambda method, job: jobs.append(job) or on_disk(method, job))
    assert "lower nsamples or seqlen" in refused("disk-full", *ARGUMENTS, "--guidance", guidance)
    method, job = guidance_methods()[guidance], jobs[-1]
    on_gpu = replace(job, devices=(torch.device("cuda"),), at_once=1)  # where hidden states wait in the host's memory
    on_cpu = replace(on_gpu, devices=(torch.device("cpu"),))
    waiting = method.waiting(on_cpu) if guidance == "tuned" else 0  # the others have copies on the disk
    assert method.on_disk(on_gpu) == method.on_disk(on_cpu) - waiting > 0
    at_once = {name: method.waiting(replace(on_cpu, at_once=count)) for name, count in (("all", 9), ("one", 1))}
    pieces = 1 if guidance == "tuned" else len(job.experts)
    assert at_once["all"] == pieces * at_once["one"]


@pytest.mark.parametrize("more", [(), ("--restart",)])
def test_what_a_killed_run_has_left_counts_as_free(pair, full_disk, more):
    left = pair / "out/deltas/.measuring.part" / ("0" * 20) / "code"
    left.mkdir(parents=True)
    (left / "states").write_bytes(bytes(2**22))
    measure(*more)
    assert not left.exists()


def test_an_out_dir_that_cannot_be_written(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("out-unwritable")


def test_something_that_is_no_file_in_the_way(pair, refused):
    (pair / "out/deltas/norms.csv").mkdir(parents=True)
    for more in ((), ("--overwrite",)):
        assert "norms.csv" in refused("out-in-the-way", *ARGUMENTS, *more)


@pytest.mark.parametrize("manifest", [{"name": "my web app"}, {"command": "utils/merger.py", "files": {}}])
def test_the_manifest_of_others_is_never_replaced(pair, refused, manifest):
    (pair / "out/deltas").mkdir(parents=True)
    (pair / "out/deltas/manifest.json").write_text(json.dumps(manifest))
    for more in ((), ("--overwrite",)):
        assert "choose another folder" in refused("out-not-ours", *ARGUMENTS, *more)


def test_a_manifest_that_is_broken(pair, refused):
    (pair / "out/deltas").mkdir(parents=True)
    (pair / "out/deltas/manifest.json").write_text("{")
    refused("manifest-unreadable")


# --- models --------------------------------------------------------------------------------------------------


def retype(folder: Path, name: str, dtype: str) -> None:
    """Store one tensor in another dtype, as a quantized checkpoint does."""
    import torch

    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(getattr(torch, dtype))}))


def use_family(pair: Path, family: str, **overrides) -> None:
    save_tiny(family, pair / "code", layers=2, **overrides)


def weights_only(pair: Path, *names: str) -> None:
    for name in names:
        (pair / "code" / name).unlink()


Q0 = "model.layers.0.self_attn.q_proj.weight"
MODELS = {
    "no folder": (lambda pair: shutil.rmtree(pair / "code"), "model-missing", ""),
    "unknown model type": (lambda pair: edit_json(pair / "code/config.json", model_type="novel"), "model-not-buildable", ""),
    "remote code": (
        lambda pair: edit_json(pair / "code/config.json", model_type="novel", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}),
        "model-not-buildable",
        "",
    ),
    "quantized": (lambda pair: edit_json(pair / "code/config.json", quantization_config={"quant_method": "awq"}), "model-quantized", "model ./code is quantized (awq)"),
    "truncated": (lambda pair: os.truncate(pair / "code/model.safetensors", 3000), "weights-truncated", ""),
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


def test_an_encoder(pair, refused):
    from transformers import AutoConfig, AutoModelForMaskedLM

    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    for name in ("base", "code", "math"):
        shutil.rmtree(pair / name)
        AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **small)).save_pretrained(pair / name)
        save_tokenizer(pair / name)
    refused("model-encoder")


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


# --- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "code"),
    [
        ({"path": "none.jsonl"}, "text-missing"),
        ({"path": "rows.jsonl"}, "text-no-column"),
        ({"path": "rows.jsonl", "text": "{quest}"}, "text-no-column"),
        ({"path": "rows.jsonl", "text": "{question}", "seqlen": 999}, None),  # samples are shorter than the positions
        ({"name": "gsm8k"}, "text-not-loadable"),
    ],
)
def test_data_sets(pair, dataset, code):
    write_config(pair, {"dataset": dataset})
    if code is None:
        measure()
    else:
        refuses(code)


def test_samples_longer_than_the_model_can_take(pair, refused):
    (pair / "rows.jsonl").write_text(json.dumps({"question": "x" * 500, "answer": ""}) + "\n")
    write_config(pair, {"nsamples": 1, "dataset": {**pair_settings()["dataset"], "seqlen": 100}})
    refused("text-too-long")


def test_parity_needs_an_end_token(pair, refused):
    for name in ("base", "code", "math"):
        edit_json(pair / name / "tokenizer_config.json", eos_token=None)
    write_config(pair, {"parity": "reference"})
    refused("tokenizer-no-eos")


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
