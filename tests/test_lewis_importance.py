"""Command 1 as a user meets it: what it writes, and how it refuses, stops and is stopped.

python -m pytest tests/test_lewis_importance.py
"""

import importlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import BOS_CHAT, contents, pair_settings, save_pair, save_tokenizer, write_config
from utils.errors import run_command

SCRIPT = "lewis_importance.py"
COMPONENTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARGUMENTS = ("--config", "pair.yaml", "--out_dir", "out/deltas")
WRITTEN = {"code_delta.csv", "math_delta.csv", "norms.csv", "manifest.json"}


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def pair(pristine, tmp_path, monkeypatch) -> Path:
    """A pair of one's own, as the current folder."""
    folder = shutil.copytree(pristine, tmp_path / "pair")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(monkeypatch) -> Callable[..., Ended]:
    """Run the command inside this process, where the libraries are already imported."""
    sys.path.insert(0, str(ROOT))
    main = importlib.import_module("lewis_importance").main
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                run_command(main)
            except SystemExit as ended:
                code = ended.code
        return Ended(code, out.getvalue(), err.getvalue())

    yield run
    sys.path.remove(str(ROOT))
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def refused(pair, command, monkeypatch) -> Callable[..., str]:
    """Run the command; it must refuse with one message, change nothing, and read no weights."""

    def read_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    def run(*arguments: object, weights: bool = False) -> str:
        before = contents(pair.parent)
        with monkeypatch.context() as patch:
            for name in () if weights else ("StreamedWeights.fetch", "ResidentWeights.__init__"):
                patch.setattr(f"utils.models.weight_source.{name}", read_weights)
            ended = command(*(arguments or ARGUMENTS))
        assert contents(pair.parent) == before
        assert ended.code == 2, ended.err
        assert "Traceback" not in ended.err
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return ended.err[ended.err.index("error: ") :]

    return run


def measure(command, *extra: object, out: str = "out/deltas") -> Ended:
    ended = command("--config", "pair.yaml", "--out_dir", out, *extra)
    assert ended.code == 0, ended.err
    return ended


# --- what it does -----------------------------------------------------------------------------------------------------


def test_measures_says_what_it_chose_and_what_comes_next(pair, command):
    before = contents(pair)
    ended = measure(command)
    after = contents(pair)
    assert {name for name in after if name not in before} == {
        "out",
        "out/deltas",
        *(f"out/deltas/{n}" for n in WRITTEN),
    }
    assert all(after[name] == content for name, content in before.items())
    lines = ended.out.splitlines()
    assert lines[0].startswith("versions: python 3")
    assert lines[1].startswith("device: ")
    assert lines[2].startswith("guidance: lewis, ")
    assert lines[3] == "text: 4 samples of rows.jsonl, seed 42, at most 32 tokens"
    assert lines[4] == f"components: {', '.join(COMPONENTS)} (every linear part of a block)"
    assert "4 samples" in ended.out and "memory: about" in ended.out
    proposed = ended.out.partition("next:\n")[2].replace("\\\n", " ").split()
    assert Path(proposed[1]).resolve() == ROOT / "lewis_merge.py"
    assert proposed[2:] == [
        *("--delta_dfs_in_dir", "out/deltas", "--config_file", "pair.yaml", "--out_dir", "out/merge_configs"),
        *("--merge_method", "ties", "--gamma", "0.3", "--epsilon", "0.8", "--lambda", "0.4"),
    ]
    assert "error" not in ended.err and "warning" not in ended.err and "block" in ended.err


def test_quiet_leaves_warnings_and_the_last_lines(pair, command):
    (pair / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    ended = measure(command, "--quiet")
    assert ended.out.startswith("wrote out/deltas/") and ended.out.splitlines()[1] == "next:"
    assert ended.err and all(line.startswith("warning: ") for line in ended.err.splitlines())


def test_tokens_are_counted_by_text(pair, command):
    texts = {name: {"path": "rows.jsonl", "text": f"{{{name}}}"} for name in ("question", "answer")}
    write_config(pair, {"calibration": {"code": texts["answer"], "math": texts["question"]}})
    lines = measure(command).out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("base: ./base"))
    base, code = lines[place + 1 : place + 3], lines[place + 4]
    assert [line.split(":")[0] for line in base] == ["  on the text for code", "  on the text for math"]
    assert base[0] == code and base[0].split(": ")[1] != base[1].split(": ")[1]
    counts = json.loads((pair / "out/deltas/manifest.json").read_text())["models"][0]["tokens"]
    assert sum(int(line.split(": ")[1].split()[0]) for line in base) == counts


def test_the_next_command_can_be_pasted_whatever_the_paths(pair, command):
    out = measure(command, out="my out; rm -rf $HOME/it's").out
    assert "--delta_dfs_in_dir 'my out; rm -rf $HOME/it'\"'\"'s'" in out


def test_the_manifest_says_where_the_numbers_come_from(pair, command):
    measure(command, "--dtype", "float32", "--device", "cpu")
    manifest = json.loads((pair / "out/deltas/manifest.json").read_text())
    assert [model["type"] for model in manifest["models"]] == ["base", "code", "math"]
    for model in manifest["models"]:
        assert model["dtype"] == "float32"
        assert model["files"]["model.safetensors"] == (pair / model["name"] / "model.safetensors").stat().st_size
    assert len(manifest["samples"]["rows"]) == 4 and manifest["samples"]["split"] is None
    assert manifest["device"] == "cpu"
    assert str(pair) not in json.dumps(manifest)  # no path of this machine beyond those the user gave
    assert set(manifest["files"]) == WRITTEN - {"manifest.json"}


def test_the_same_request_again_is_done_at_once(pair, command, monkeypatch):
    measure(command)
    before = {name: (pair / "out/deltas" / name).stat().st_mtime_ns for name in WRITTEN}
    monkeypatch.setattr("utils.models.weight_source.StreamedWeights.fetch", None)  # not needed
    ended = measure(command)
    assert "out/deltas already holds exactly this measurement; nothing to do" in ended.out
    assert "lewis_merge.py --delta_dfs_in_dir out/deltas" in ended.out
    assert {name: (pair / "out/deltas" / name).stat().st_mtime_ns for name in WRITTEN} == before


@pytest.mark.parametrize("change", ["config", "weights", "text", "an edited table", "a missing table"])
def test_another_request_needs_overwrite(pair, command, refused, change):
    measure(command)
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
    assert "give --overwrite to replace, or another folder" in refused()
    assert "wrote out/deltas/code_delta.csv" in measure(command, "--overwrite").out


def test_another_config_in_the_folder_is_refused_before_the_libraries_load(pair, command, refused, monkeypatch):
    measure(command)
    write_config(pair, {"nsamples": 3})
    monkeypatch.setattr("utils.commands.measure.quiet_libraries", None)
    assert "already holds code_delta.csv, math_delta.csv, norms.csv, manifest.json" in refused()


def test_files_of_others_in_the_folder_stay(pair, command):
    folder = pair / "out/deltas"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    measure(command)
    measure(command, "--overwrite")
    assert {path.name for path in folder.iterdir()} == {*WRITTEN, "notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"


def test_doubts_are_told_as_warnings(pair, command):
    (pair / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    edit_json(pair / "code/config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    save_tokenizer(pair / "math", bos=False)
    err = measure(command).err
    assert "warning: all 4 samples are the same 4 tokens" in err
    assert "warning: the longest sample has 4 tokens" in err
    assert "warning: ./code rotates positions differently from the base" in err
    assert "warning: ./math and the base split the text into different tokens" in err


def test_a_copy_of_the_base_is_measured_with_a_warning(pair, command):
    shutil.rmtree(pair / "code")
    shutil.copytree(pair / "base", pair / "code")
    ended = measure(command)
    assert "warning: ./code has exactly the base's norms everywhere; is it the same model?" in ended.err
    assert set((pair / "out/deltas/code_delta.csv").read_text().split("\n")[1].split(",")) == {"0.0"}


def test_text_from_chat(pair, command):
    rows = [{"m": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Ho"}]} for i in range(5)]
    (pair / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("base", "code", "math"):
        save_tokenizer(pair / name, chat_template=BOS_CHAT)
    write_config(pair, {"dataset": {"path": "chat.jsonl", "messages": "m", "seqlen": 64}})
    assert "first ids [0, 31," in measure(command).out  # one BOS, then '<'


def test_differences_that_do_not_matter(pair, command):
    """Another vocabulary size, dtype and tied head; a tokenizer without special tokens; a layer of zeros."""
    from safetensors.torch import load_file, save_file

    save_tiny("llama", pair / "code", seed=1, layers=2, vocab_size=100, tie_word_embeddings=True)
    tensors = {name: tensor.float() for name, tensor in load_file(pair / "code/model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, pair / "code/model.safetensors", metadata={"format": "pt"})
    for name in ("base", "code", "math"):
        edit_json(pair / name / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
    ended = measure(command)
    assert "code: ./code, LlamaForCausalLM, 2 blocks, " in ended.out and "float32 (the checkpoint's own)" in ended.out
    norms = (pair / "out/deltas/norms.csv").read_text()
    assert "code,1,up_proj,model.layers.1.mlp.up_proj.weight,0.0,1536" in norms


# --- refused: the config file -----------------------------------------------------------------------------------------


def test_config_files_that_are_none(pair, refused):
    (pair / "empty.yaml").touch()
    (pair / "list.yaml").write_text("- a\n")
    (pair / "tag.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{pair / 'made'}]\n")
    (pair / "twice.yaml").write_text("nsamples: 1\nnsamples: 2\n")
    for name, words in {
        "none.yaml": "pair config none.yaml does not exist",
        "base": "pair config base is a folder; give the file",
        "empty.yaml": "pair config empty.yaml is empty",
        "list.yaml": "must be a mapping of keys to values",
        "tag.yaml": "could not determine a constructor for the tag",
        "twice.yaml": "line 2: key 'nsamples' is given twice (first in line 1)",
        "/dev/zero": "is larger than 1 MiB",
    }.items():
        assert words in refused("--config", name, "--out_dir", "out")


def test_problems_of_the_config_are_told_together(pair, refused):
    write_config(pair, {"nsample": 3, "sparsity_ratio": 50})
    said = refused()
    assert "2 problems" in said and "did you mean 'nsamples'?" in said and "50% is 0.5" in said


# --- refused: flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--overwrite",), "the following arguments are required: --config, --out_dir"),
        (("--config", "pair.yaml"), "the following arguments are required: --out_dir"),
        (("--config", "pair.yaml", "--outdir", "out"), "unknown argument '--outdir'; did you mean --out_dir?"),
        ((*ARGUMENTS, "--out-dir", "other"), "--out_dir is given twice"),
        ((*ARGUMENTS, "--overwrite", "maybe"), "'maybe' is neither True nor False"),
        ((*ARGUMENTS, "--trust_remote_code", "yess"), "'yess' is neither True nor False"),
        ((*ARGUMENTS, "--device", "mps"), "--device 'mps' is not supported; use auto, cpu, cuda or cuda:n"),
        ((*ARGUMENTS, "--device", "gpu"), "--device 'gpu' is unknown; use auto, cpu, cuda or cuda:n"),
        ((*ARGUMENTS, "--device", ""), "--device '' is unknown"),
        ((*ARGUMENTS, "--device", "cuda:99"), "--device cuda:99: "),
        ((*ARGUMENTS, "--dtype", "fp16"), "invalid choice: 'fp16'"),
        ((*ARGUMENTS, "--micro_batch_tokens", "0"), "0 is outside [1, "),
        ((*ARGUMENTS, "--micro_batch_tokens", "1e3"), "'1e3' is not a whole number"),
        (("--config", "", "--out_dir", "out"), "the path is empty"),
        (("--config", "pair.yaml", "--out_dir", " "), "the path is empty"),
        (("--config", "pair.yaml", "--out_dir", "~no_such_user/x"), "no such user's home folder"),
        (("--config", "pair.yaml", "--out_dir", "rows.jsonl"), "rows.jsonl is a file, not a folder"),
        (("--config", "pair.yaml", "--out_dir", "pair.yaml/x"), "pair.yaml is a file, not a folder"),
        (("--config", "pair.yaml", "--out_dir", "x" * 300), "--out_dir"),
        (("--config", "pair.yaml", "--out_dir", "./code"), "--out_dir code is the folder of model ./code"),
    ],
)
def test_flags(refused, flags, words):
    assert words in refused(*flags)


def test_device_cuda_without_a_gpu(refused):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "sees no CUDA GPU; use --device cpu" in refused(*ARGUMENTS, "--device", "cuda")


def test_an_out_dir_that_cannot_be_written(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not writable" in refused()


def test_something_that_is_no_file_in_the_way(pair, refused):
    (pair / "out/deltas/norms.csv").mkdir(parents=True)
    for more in ((), ("--overwrite",)):
        assert "norms.csv is in the way and is not a file" in refused(*ARGUMENTS, *more)


def test_a_manifest_that_is_broken(pair, refused):
    (pair / "out/deltas").mkdir(parents=True)
    (pair / "out/deltas/manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in refused()


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
    "no folder": (lambda pair: shutil.rmtree(pair / "code"), "model folder ./code does not exist"),
    "no config": (lambda pair: weights_only(pair, "config.json"), "code has no config.json; is it a model folder?"),
    "broken config": (lambda pair: (pair / "code/config.json").write_text("{"), "model ./code: config.json is not valid JSON"),
    "no architecture": (lambda pair: edit_json(pair / "code/config.json", architectures=None), "config.json names no model class"),
    "unknown model type": (lambda pair: edit_json(pair / "code/config.json", model_type="novel"), "model ./code: "),
    "remote code": (
        lambda pair: edit_json(pair / "code/config.json", model_type="novel", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}),
        "model ./code: ",
    ),
    "quantized": (lambda pair: edit_json(pair / "code/config.json", quantization_config={"quant_method": "awq"}), "model ./code is quantized (awq)"),
    "encoder-decoder": (lambda pair: edit_json(pair / "code/config.json", is_encoder_decoder=True), "is an encoder-decoder"),
    "only GGUF": (lambda pair: (pair / "code/model.safetensors").rename(pair / "code/m.gguf"), "only m.gguf"),
    "only pickles": (lambda pair: (pair / "code/model.safetensors").rename(pair / "code/pytorch_model.bin"), "pickled weights can run code"),
    "an adapter": (lambda pair: (pair / "code/model.safetensors").rename(pair / "code/adapter_model.safetensors") and (pair / "code/adapter_config.json").write_text("{}"), "model ./code is a LoRA adapter"),
    "truncated": (lambda pair: os.truncate(pair / "code/model.safetensors", 3000), "model ./code: model.safetensors is truncated"),
    "a huge header": (lambda pair: (pair / "code/model.safetensors").write_bytes(struct.pack("<Q", 2**37) + bytes(99)), "header of 137438953472 bytes"),
    "a stale index": (lambda pair: (pair / "code/model.safetensors.index.json").write_text("{}"), "two sets of weights"),
    "a link to itself": (lambda pair: weights_only(pair, "model.safetensors") or (pair / "code/model.safetensors").symlink_to("model.safetensors"), "is a folder or a broken link"),
    "an integer weight": (lambda pair: retype(pair / "code", Q0, "int8"), f"tensor {Q0} is stored as I8, not as floating-point numbers"),
    "an fp8 weight": (lambda pair: retype(pair / "code", Q0, "float8_e4m3fn"), f"tensor {Q0} is stored as F8_E4M3"),
    "an integer norm": (lambda pair: retype(pair / "code", "model.norm.weight", "int32"), "tensor model.norm.weight is stored as I32"),
    "fewer layers": (lambda pair: save_tiny("llama", pair / "code", layers=1), "is no fine-tune of the base ./base, so they cannot be compared: 1 decoder blocks against 2"),
    "wider": (lambda pair: use_family(pair, "llama", intermediate_size=64), "gate_proj.weight is [64, 32] against [48, 32]"),
    "other heads": (lambda pair: use_family(pair, "llama", num_attention_heads=2, num_key_value_heads=1, head_dim=16), "num_attention_heads is 2 against 4"),
    "another type": (lambda pair: use_family(pair, "qwen2"), "model_type is qwen2 against llama"),
    "a config of other shapes": (lambda pair: edit_json(pair / "code/config.json", intermediate_size=64), "is [48, 32] in the checkpoint but config.json makes it [64, 32]"),
    "zero heads": (lambda pair: edit_json(pair / "code/config.json", num_attention_heads=0), "model ./code: transformers cannot build"),
    "a size that is text": (lambda pair: edit_json(pair / "code/config.json", hidden_size="wide"), "model ./code: transformers cannot build"),
    "a million layers": (lambda pair: edit_json(pair / "code/config.json", num_hidden_layers=10**6, layer_types=None), "asks for 1000000 layers, the weights hold 2"),
    "a negative size": (lambda pair: edit_json(pair / "code/config.json", intermediate_size=-1), "model ./code: transformers cannot build"),
    "no tokenizer": (lambda pair: weights_only(pair, "tokenizer.json", "tokenizer_config.json"), "code; put the tokenizer.json and tokenizer_config.json it was trained with there"),
    "half a tokenizer": (lambda pair: weights_only(pair, "tokenizer.json"), "model ./code: "),
    "a broken tokenizer": (lambda pair: (pair / "code/tokenizer.json").write_text("{"), "model ./code: its tokenizer cannot be loaded from"),
    "a tokenizer of another model": (lambda pair: use_family(pair, "llama", vocab_size=40), "its tokenizer gives token "),
    "the same folder twice": (lambda pair: (shutil.rmtree(pair / "code"), (pair / "code").symlink_to("base")), "they are the same folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_refused_before_weights_are_read(pair, refused, case):
    change, words = MODELS[case]
    change(pair)
    said = refused()
    assert words in said
    assert "./code" in said


@pytest.mark.parametrize("family", ["gemma", "gpt2", "qwen2"])
def test_a_tokenizer_that_transformers_would_make_up(pair, refused, family):
    """For these types transformers builds a tokenizer without a vocabulary where there are no files."""
    for name in ("base", "code", "math"):
        shutil.rmtree(pair / name)
        save_tiny(family, pair / name, layers=1)
    assert re.search("holds no vocabulary for its tokenizer|its tokenizer cannot be loaded", refused())


def test_other_kinds_of_models(pair, refused):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    for model_type, auto, words in (
        ("bert", AutoModelForMaskedLM, "model ./base is an encoder (bert); only decoders are supported"),
        ("mixtral", AutoModelForCausalLM, "mixture-of-experts layers are not measured"),
    ):
        for name in ("base", "code", "math"):
            shutil.rmtree(pair / name)
            auto.from_config(AutoConfig.for_model(model_type, **small)).save_pretrained(pair / name)
            save_tokenizer(pair / name)
        assert words in refused()


def test_hub_ids_that_are_not_here(pair, refused):
    models = [{"name": "nobody/base", "type": "base"}, {"name": "./code", "type": "code"}]
    write_config(pair, {"model_info": models})
    said = refused()
    assert "model nobody/base: no such folder here" in said and "HF_HUB_OFFLINE is set" in said
    write_config(pair, {"model_info": [{**models[0], "name": "no such id"}, models[1]]})
    assert "model no such id: neither a folder here" in refused()
    write_config(pair, {"model_info": [{"name": "./base", "type": "base", "revision": "v1"}, models[1]]})
    assert "model ./base is a local folder, which has no revision 'v1'" in refused()


def test_components_that_the_models_do_not_have(pair, refused):
    write_config(pair, {"components": ["q_proj", "c_proj"]})
    assert "component 'c_proj' is not a linear part of its blocks; they have self_attn.q_proj" in refused()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(pair, refused, value):
    poison(pair / "code", Q0, value)
    said = refused(*ARGUMENTS, weights=True)
    assert "model ./code: the norm of model.layers.0." in said and "its weights or its inputs are not finite" in said


def test_an_overflow_names_the_dtype(pair, refused):
    poison(pair / "code", "model.embed_tokens.weight", 1e30)
    (pair / "rows.jsonl").write_text('{"question": "<s>", "answer": "x"}\n' * 4)
    said = refused(*ARGUMENTS, "--dtype", "float16", weights=True)
    assert "torch.float16" in said and "--dtype float32 or bfloat16" in said


def test_a_model_that_changes_while_it_is_measured(pair, refused, monkeypatch):
    from utils.guidance.measure_job import MeasureJob

    run = MeasureJob.run

    def run_and_touch(*args):
        results = run(*args)
        os.utime(pair / "math/model.safetensors", ns=(1, 1))
        return results

    monkeypatch.setattr(MeasureJob, "run", run_and_touch)
    assert "model ./math: its weight files changed while they were measured" in refused(*ARGUMENTS, weights=True)


# --- refused: text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"path": "none.jsonl"}, "dataset.path none.jsonl does not exist"),
        ({"path": "pair.yaml"}, "unknown kind of file"),
        ({"path": "https://example.org/x.jsonl"}, "is a URL"),
        ({"path": "rows.jsonl"}, "no column 'text' (columns: question, answer); give dataset.text"),
        ({"path": "rows.jsonl", "text": "{quest}"}, "no column 'quest'"),
        ({"path": "rows.jsonl", "text": "{}"}, "write columns as {column}"),
        ({"path": "rows.jsonl", "messages": "question"}, "column 'question' is not a list of chat messages"),
        ({"path": "rows.jsonl", "text": "{question}", "split": "test"}, "is a file, which has no split"),
        ({"path": "rows.jsonl", "text": "{question}", "seqlen": 999}, None),  # samples are shorter than the positions
        ({"name": "gsm8k"}, "dataset openai/gsm8k (main), split train: cannot be loaded"),
        ("mbpp", "dataset google-research-datasets/mbpp (full), split train: cannot be loaded"),
    ],
)
def test_data_sets(pair, refused, command, dataset, words):
    write_config(pair, {"dataset": dataset})
    if words is None:
        measure(command)
    else:
        assert words in refused()


def test_fewer_rows_than_samples(pair, refused):
    write_config(pair, {"nsamples": 15})
    assert "dataset rows.jsonl has 12 rows, but nsamples is 15; lower nsamples" in refused()


def test_samples_longer_than_the_model_can_take(pair, refused):
    (pair / "rows.jsonl").write_text(json.dumps({"question": "x" * 500, "answer": ""}) + "\n")
    write_config(pair, {"nsamples": 1, "dataset": {**pair_settings()["dataset"], "seqlen": 100}})
    assert "model ./base has 64 positions, but samples reach 100 tokens; lower seqlen" in refused()


def test_parity_needs_an_end_token(pair, refused):
    for name in ("base", "code", "math"):
        edit_json(pair / name / "tokenizer_config.json", eos_token=None)
    write_config(pair, {"parity": "reference"})
    assert "parity: reference pads with EOS, but the tokenizer has no EOS token" in refused()


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "at"), [("fsync", 1), ("fsync", 4), ("replace", 1), ("replace", 4)])
def test_a_disk_that_fills_up_at_the_end(pair, refused, monkeypatch, call, at):
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    said = refused(*ARGUMENTS, weights=True)
    assert said == "error: No space left on device; nothing unfinished was left behind [os-error]\n"


# --- fuzz: only success or one message --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_fuzz_the_small_files_of_a_model(pair, name):
    """A fixed-seed mutator: values of the JSON are replaced or dropped."""
    import random

    import torch

    from utils.errors import UserError
    from utils.pair.calibration import Sample
    from utils.pair.config import read_pair_config
    from utils.passes.subjects import Precision, prepare_subjects

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
    for arguments, code, words in (
        (("--config", "model.yaml", "--out_dir", "out"), 2, "model folder ./gone does not exist"),
        (("--config", "adapter.yaml", "--out_dir", "out"), 2, "adapters (model+adapter) are for merge recipes"),
        (("--config", "text.yaml", "--out_dir", "out"), 2, "dataset.path gone.jsonl does not exist"),
        (("--help",), 0, "--micro_batch_tokens"),
        (
            ("--config", "none.yaml", "--out_dir", "out"),
            2,
            "error: pair config none.yaml does not exist [file-missing]\n",
        ),
        (("--config", "pair.yaml", "--out_dir", "rows.jsonl"), 2, "rows.jsonl is a file, not a folder"),
    ):
        command = [sys.executable, "-X", "importtime", str(ROOT / SCRIPT), *arguments]
        ended = subprocess.run(command, cwd=pair, capture_output=True, text=True, timeout=60)
        assert ended.returncode == code
        imported = {
            line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")
        }
        assert not {"torch", "transformers", "pandas", "numpy", "datasets"} & imported
        said = ended.stdout + "".join(x for x in ended.stderr.splitlines(True) if not x.startswith("import time"))
        assert words in said and "Traceback" not in said
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


def assert_unwound(pair: Path, process: subprocess.Popen, err: str, out: str) -> None:
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted; nothing unfinished was left behind")
    assert not (pair / out).exists()


def test_interrupted_killed_crowded_and_bare(pair, command):
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
        crowded = command("--config", "pair.yaml", "--out_dir", "interrupted/deep")
        assert crowded.code == 2 and "interrupted/deep is being written by another run; wait for it" in crowded.err
        assert_unwound(pair, interrupted, said + ended_by(interrupted, "SIGINT"), "interrupted")
        ended_by(killed, "SIGKILL")
        err = bare.communicate(timeout=120)[1]
        assert bare.returncode == 0, err
        assert "Traceback" not in err and "warning" not in err.lower()
    finally:
        for process in (interrupted, killed, bare):
            process.kill()
    assert list((pair / "killed/deep").iterdir()) == []
    measure(command, out="killed/deep")  # nothing is in the way after a kill
    ours = {name: (pair / "killed/deep" / name).read_bytes() for name in WRITTEN}
    assert {name: (pair / "bare" / name).read_bytes() for name in WRITTEN} == ours
    now = contents(pair)
    assert {name: now[name] for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_termination_is_an_interrupt(pair, name):
    process = start(pair, WAITING, "out")
    try:
        assert_unwound(pair, process, wait_for(process, "AT WORK") + ended_by(process, name), "out")
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
    assert process.returncode in (0, 130, -getattr(signal, name), 1)
    if process.returncode == 130:
        assert "Traceback" not in err
