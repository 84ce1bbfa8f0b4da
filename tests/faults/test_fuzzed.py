"""Every kind of file that somebody else writes, changed at random: success or one message, in seconds, with little memory.

python -m pytest tests/faults/test_fuzzed.py                       a few inputs of commands 2 and 3
python -m pytest tests/faults/test_fuzzed.py -m slow               10,000 in forks of a warm process, in parts, and 300 as
                                                                   real command lines
FUZZED="merge 3 17" python -m pytest tests/faults/test_fuzzed.py -m slow -k input_again    input 17 of part 3 of a command
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.faults.conftest import Server
from tests.faults.mutations import (
    Mutation,
    changed_json,
    changed_lines,
    changed_table,
    changed_template,
    changed_weights,
    changed_yaml,
)
from tests.faults.outcomes import is_one_message
from tests.faults.pair import BYSTANDERS, COMMANDS, copy_of, make_pair
from tests.tiny_pairs import CHATML

SECONDS, KILOBYTES = 10, 2**20  # of processor time; more than the command takes with unchanged files
PART = 100
PARTS = {"measure": 20, "decide": 30, "merge": 38, "evaluate": 7, "search": 5}  # 10,000 inputs
REAL = {"measure": 60, "decide": 90, "merge": 110, "evaluate": 20, "search": 20}  # 300 command lines
_MODEL: dict[str, Mutation] = {
    "config.json": changed_json,
    "tokenizer.json": changed_json,
    "tokenizer_config.json": changed_json,
    "chat_template.jinja": changed_template,
    "model.safetensors": changed_weights,
}
_SHARDED = {"model.safetensors.index.json": changed_json, "model-1.safetensors": changed_weights}
_ADAPTER = {"adapter_config.json": changed_json, "adapter_model.safetensors": changed_weights}


def _in(folder: str, files: dict[str, Mutation]) -> dict[str, Mutation]:
    return {f"{folder}/{name}": change for name, change in files.items()}


PAIR = {"pair.yaml": changed_yaml, "rows.jsonl": changed_lines, **_in("base", _MODEL), **_in("code", _MODEL)}
JUDGED = {"judged.yaml": changed_yaml, "judged.jsonl": changed_lines, **_in("base", _MODEL), **_in("math", _MODEL)}
TABLES = {
    "dfs/manifest.json": changed_json,
    "dfs/norms.csv": changed_table,
    "dfs/code_delta.csv": changed_table,
    "dfs/math_delta.csv": changed_table,
}
MERGED = {
    "recipe.yaml": changed_yaml,
    **_in("merged/base", _MODEL),
    "merged/base/generation_config.json": changed_json,
    **_in("merged/code", _MODEL),
    **_in("merged/shards", _SHARDED),
    **_in("adapter", _ADAPTER),
}
FILES: dict[str, dict[str, Mutation]] = {
    "measure": PAIR | _in("adapter", _ADAPTER),
    "decide": TABLES | {"pair.yaml": changed_yaml, "base/config.json": changed_json, "code/config.json": changed_json,
                        "code/model.safetensors": changed_weights},
    "merge": MERGED,
    "evaluate": JUDGED,
    "search": JUDGED,
}  # fmt: skip
OTHER_FILES = {"adapted.yaml": "measure", "adapted_recipe.yaml": "merge", "sharded_recipe.yaml": "merge"}
OFTEN = {"pair.yaml": 4, "judged.yaml": 6, "recipe.yaml": 6, "dfs/manifest.json": 2}  # times as often as other files


@dataclass(frozen=True)
class Input:
    """One changed file, and the command line that meets it. `words` begin with the script."""

    file: str
    content: bytes
    words: tuple[str, ...]


def input_of(folder: Path, command: str, part: int, number: int) -> Input:
    """The changed file of a number; the same one on every machine."""
    chance = Random(f"{command} {part} {number}")
    files = FILES[command]
    file = chance.choices(list(files), [OFTEN.get(name, 1) for name in files])[0]
    content, before = b"", (folder / file).read_bytes()
    for _ in range(9):  # a change may change nothing
        if (content := files[file](before, chance)) != before:
            break
    words = COMMANDS[command]
    if file.startswith("adapter/"):
        words = tuple(
            {"pair.yaml": "adapted.yaml", "recipe.yaml": "adapted_recipe.yaml"}.get(word, word) for word in words
        )
    if file.startswith("merged/shards/"):
        words = tuple("sharded_recipe.yaml" if word == "recipe.yaml" else word for word in words)
    if command == "merge" and chance.random() < 0.4:
        words = (*words, "--dry_run")
    if command == "decide" and chance.random() < 0.7:
        words = (*words, "--accept_edited")
    return Input(file, content, words)


@pytest.fixture(scope="module")
def made(plain_server, tmp_path_factory) -> Path:
    """The pair with a measurement of it, chat templates, an adapter, a model in shards, and a bystander's files."""
    folder = make_pair(tmp_path_factory.mktemp("pair") / "made")
    done = plain_server.run(*(word.removeprefix("out/") for word in COMMANDS["measure"]), cwd=folder)
    assert done["code"] == 0, done["stderr"]
    for model in ("base", "code", "math", "merged/base", "merged/code"):
        (folder / model / "chat_template.jinja").write_text(CHATML)
    _in_shards(folder / "merged" / "code", folder / "merged" / "shards")
    _save_adapter(folder / "adapter")
    _write_others(folder)
    return copy_of(folder, folder.with_name("copy"))


def _in_shards(model: Path, to: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    places = {name: f"model-{place % 2}.safetensors" for place, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, to / file, {"format": "pt"})
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _save_adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    torch.manual_seed(3)
    parts = {f"{path}.lora_A.weight": torch.randn(2, 32), f"{path}.lora_B.weight": torch.randn(32, 2)}
    save_file(parts, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _write_others(folder: Path) -> None:
    pair = yaml.safe_load((folder / "pair.yaml").read_text())
    pair["model_info"][1]["name"] = "./base+./adapter"
    (folder / "adapted.yaml").write_text(yaml.safe_dump(pair, sort_keys=False))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "adapted_recipe.yaml").write_text(recipe.replace("merged/code", "merged/base+adapter"))
    (folder / "sharded_recipe.yaml").write_text(recipe.replace("merged/code", "merged/shards"))


@pytest.fixture(scope="module")
def usual(plain_server, made) -> Callable[[str], int]:
    """What a command takes with unchanged files: kilobytes at the peak."""

    @cache
    def peak(command: str) -> int:
        peaks = []
        for file in (None, *OTHER_FILES):
            if file is None or OTHER_FILES[file] == command:
                words = [file if file and word in ("pair.yaml", "recipe.yaml") else word for word in COMMANDS[command]]
                done = plain_server.run(*words, cwd=made)
                assert done["code"] == 0, (words, done["stderr"])
                peaks.append(done["peak_kb"])
                _clear(made)
        return min(peaks)

    return peak


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    for name, text in BYSTANDERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


INTERIM = ("losses", "study.db")  # what evaluator and searcher keep to go on from


def wrong_with(done: dict[str, Any], folder: Path, usual: int) -> str:
    """What is not as promised, or nothing."""
    text = done["stderr"]
    if done["code"] not in (0, 2):
        return f"code {done['code']}"
    if "Traceback" in text or len(text) > 5000 or "Error:" in text.partition("error: ")[0]:
        return "a traceback, or a long message"
    if done["code"] == 2 and not is_one_message(text):
        return "not one message with a code at its end"
    if done["processor"] > SECONDS:
        return f"{done['processor']:.0f} s"
    if done["peak_kb"] > usual + KILOBYTES:
        return f"{done['peak_kb']} KB, usually {usual}"
    left = [path.relative_to(folder).as_posix() for path in sorted((folder / "out").rglob("*")) if path.is_file()]
    if done["code"] == 2 and (more := [one for one in left if one not in BYSTANDERS and not _is_interim(one, text)]):
        return f"refused, but wrote {more[:3]}"
    if any((folder / name).read_text() != content for name, content in BYSTANDERS.items()):
        return "the bystander's files are others"
    return ""


def _is_interim(name: str, said: str) -> bool:
    """Finished work that the same line goes on from: a loss, or what a message says stays in a hidden folder."""
    return any(part in INTERIM or (part.startswith(".") and part in said) for part in name.split("/"))


def _meet(server: Server, folder: Path, one: Input, usual: int) -> str:
    before = (folder / one.file).read_bytes()
    (folder / one.file).write_bytes(one.content)
    try:
        done = server.run(*one.words, cwd=folder, memory_mb=3000)
        wrong = wrong_with(done, folder, usual)
        return wrong and f"{wrong}: {one.file}, {' '.join(one.words)}: {done['stderr'][-1500:]}"
    finally:
        (folder / one.file).write_bytes(before)
        _clear(folder)


def _fuzz(server: Server, made: Path, kept: Path, command: str, part: int, numbers: Iterator[int], usual: int) -> None:
    """Meet inputs; those that something is wrong with are left in `kept`."""
    found = []
    for number in numbers:
        one = input_of(made, command, part, number)
        if wrong := _meet(server, made, one, usual):
            found.append(f'FUZZED="{command} {part} {number}" {wrong}')
            (kept / f"{command}_{part}_{number}_{Path(one.file).name}").write_bytes(one.content)
    assert not found, f"{len(found)} of the inputs, files in {kept}:\n" + "\n".join(found)


@pytest.mark.parametrize("command", ["decide", "merge"])
def test_a_few_changed_files(plain_server, made, usual, tmp_path, command):
    _fuzz(plain_server, made, tmp_path, command, 0, iter(range(6)), usual(command))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("command", "part"),
    [
        pytest.param(command, part, id=f"{command}-{part}-of-{parts}")
        for command, parts in PARTS.items()
        for part in range(1, parts + 1)
    ],
)
def test_many_changed_files(plain_server, made, usual, tmp_path, command, part):
    _fuzz(plain_server, made, tmp_path, command, part, iter(range(PART)), usual(command))


@pytest.mark.slow
@pytest.mark.skipif("FUZZED" not in os.environ, reason="for one input: FUZZED='command part number'")
def test_one_input_again(plain_server, made, usual, tmp_path):
    command, part, number = os.environ["FUZZED"].split()
    _fuzz(plain_server, made, tmp_path, command, int(part), iter([int(number)]), usual(command))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("command", REAL)
def test_changed_files_and_real_command_lines(made, tmp_path, command):
    """Whole processes end with 0 or with 2 and one message, too."""
    found = []
    for number in range(REAL[command]):
        one = input_of(made, command, 0, number)
        before = (made / one.file).read_bytes()
        (made / one.file).write_bytes(one.content)
        try:
            script, *words = one.words
            done = subprocess.run(
                [sys.executable, str(ROOT / script), *words],
                cwd=made,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=120,
            )
            code, text = done.returncode, done.stderr
            if (
                code not in (0, 2)
                or "Traceback" in text
                or (code == 2) != (len(re.findall("^error: ", text, flags=re.M)) == 1)
            ):
                found.append(f"{command} 0 {number} {one.file}: {code} {text[-1500:]}")
                (tmp_path / f"{number}_{Path(one.file).name}").write_bytes(one.content)
        finally:
            (made / one.file).write_bytes(before)
            _clear(made)
    assert not found, f"files in {tmp_path}:\n" + "\n".join(found)
