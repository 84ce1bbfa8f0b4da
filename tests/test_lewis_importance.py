"""Command 1 as a user meets it: what it measures, says and writes.

python -m pytest tests/test_lewis_importance.py
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.measuring_here import WRITTEN, measure, refuses
from tests.tiny_checkpoints import edit_tensors, save_tiny
from tests.tiny_pairs import BOS_CHAT, contents, edit_json, save_tokenizer, write_config

COMPONENTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    lines = measure("--accept_useless_text").stdout.splitlines()
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


@pytest.mark.parametrize(
    "change", ["config", "a setting of a model", "weights", "text", "an edited table", "a missing table"]
)
def test_another_request_needs_overwrite(pair, monkeypatch, change):
    measure()
    table = pair / "out/deltas/code_delta.csv"
    if change == "config":
        write_config(pair, {"nsamples": 3})
    elif change == "a setting of a model":
        edit_json(pair / "code/config.json", rms_norm_eps=0.5)
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
    save_tiny("llama", pair / "code", seed=1, layers=2, vocab_size=100, tie_word_embeddings=True)
    edit_tensors(pair / "code", lambda tensors: tensors.update({name: own.float() for name, own in tensors.items()}))
    edit_tensors(pair / "code", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].zero_())
    for name in ("base", "code", "math"):
        edit_json(pair / name / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
    ended = measure()
    assert (
        "code: ./code, LlamaForCausalLM, 2 blocks, " in ended.stdout
        and "float32 (the checkpoint's own)" in ended.stdout
    )
    norms = (pair / "out/deltas/norms.csv").read_text()
    assert "code,1,up_proj,model.layers.1.mlp.up_proj.weight,0.0,1536" in norms


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
    said, nothing = refuses("os-error"), (call, at) == ("fsync", 1)  # the first result is not on the disk yet
    ending = "nothing unfinished was left behind" if nothing else r"what is finished stays in out/deltas/\S+, where .*"
    file = r" \(out/deltas/\S+\)" if call == "fsync" else ""
    assert re.fullmatch(rf"error: No space left on device{file}; {ending} \[os-error\]\n", said)
