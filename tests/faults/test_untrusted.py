"""Models, configs and recipes that somebody made to do harm: success or one message, in seconds, with little memory.

python -m pytest tests/faults/test_untrusted.py -m slow
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.pair import COMMANDS, make_pair

pytestmark = pytest.mark.slow
SECONDS, MEGABYTES = 30, 3000  # on a machine that is busy with other tests; a process with everything imported has 700


@pytest.fixture(scope="module")
def made(plain_server, tmp_path_factory) -> Path:
    """The pair with a measurement of it."""
    folder = make_pair(tmp_path_factory.mktemp("pair") / "made")
    done = plain_server.run(*(word.removeprefix("out/") for word in COMMANDS["measure"]), cwd=folder)
    assert done["code"] == 0, done["stderr"]
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "pair")
    recipe = tmp_path / "pair" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(tmp_path / "pair")))
    return tmp_path / "pair"


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        data = json.loads((model / name).read_text())
        for key, value in changes.items():
            place = data
            *steps, last = key.split("__")
            for step in steps:
                place = place[step]
            place[last] = value
        (model / name).write_text(json.dumps(data))

    return edit


def _template(text: str) -> Callable[[Path], None]:
    return lambda model: (model / "chat_template.jinja").write_text(text) and None


def _truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size // 2)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS: dict[str, Callable[[Path], None]] = {
    "no heads": _edit("config.json", num_attention_heads=0),
    "negative epsilon": _edit("config.json", rms_norm_eps=-1),
    "epsilon that is no number": _edit("config.json", rms_norm_eps=float("nan")),
    "endless range": _edit("config.json", initializer_range=float("inf")),
    "tied by a word": _edit("config.json", tie_word_embeddings="no"),
    "a path for a type": _edit("config.json", model_type="../x"),
    "a dtype that is none": _edit("config.json", dtype="float4"),
    "code of a number": _edit("config.json", auto_map=5),
    "a hundred million labels": _edit("config.json", num_labels=10**8),
    "giant heads": _edit("config.json", head_dim=10**9),
    "labels in their place": _edit("config.json", id2label={str(one): str(one) for one in range(10)}, num_labels=3),
    "an unknown activation": _edit("config.json", hidden_act="../../x"),
    "rope of another kind": _edit("config.json", rope_parameters={"rope_type": "x", "rope_theta": 1.0}),
    "layer types": _edit("config.json", layer_types=["x"] * 7),
    "half a weight file": _truncate,
    "a template that is no text": _template("{% if %}"),
    "a regular expression that explodes": _edit(
        "tokenizer.json",
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+|[a-z]+|a)+$"}, "behavior": "Isolated", "invert": False},
    ),
    "a vocabulary of a giant id": _edit("tokenizer.json", model__vocab={"<s>": 2**31}),
    "no tokenizer model": _edit("tokenizer.json", model=None),
}  # fmt: skip
SLOW = {"a template without end": _template(LOOP)}


def _check(done: dict[str, Any], what: object = "") -> None:
    assert done["code"] in (0, 2), (what, done)
    assert "Traceback" not in done["stderr"] and len(done["stderr"]) < 5000, (what, done["stderr"][-3000:])
    assert done["code"] == 0 or done["stderr"].count("error: ") == 1, (what, done["stderr"])
    assert done["seconds"] < SECONDS and done["peak_kb"] < MEGABYTES * 1024, (what, done)


@pytest.mark.parametrize("attack", [*ATTACKS, *SLOW])
@pytest.mark.parametrize("command", ["measure", "merge", "evaluate"])
def test_a_model_made_to_do_harm(plain_server, folder, command, attack):
    model = folder / ("merged/base" if command == "merge" else "base")
    (ATTACKS | SLOW)[attack](model)
    done = plain_server.run(*COMMANDS[command], cwd=folder)
    _check(done)
    assert done["code"] == 0 or not (folder / "out").exists()
    if attack in SLOW:
        assert "[model-breaks-libraries]" in done["stderr"] and "chat template" in done["stderr"]


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, y]", *(f"a{one}: &a{one} [*a{one - 1}, *a{one - 1}]" for one in range(1, levels))]
    return "\n".join([*lines, f"models: *a{levels - 1}", "merge_method: ties", ""])


@pytest.mark.parametrize(
    "text",
    [
        _bomb(49),
        "models: &m\n  - model: x\n    parameters: {density: *m}\nmerge_method: ties\n",
        "merge_method: linear\nmodels: [" + "{model: x}, " * 150_000 + "]\n",
        "merge_method: linear\nmodels: " + "[" * 400 + "]" * 400 + "\n",
        "merge_method: ties\nmodels: [{model: {model: {path: [1]}}}]\n",
    ],
    ids=["bomb", "recursive", "long", "deep", "nested"],
)
def test_a_recipe_made_to_do_harm(plain_server, folder, text):
    (folder / "recipe.yaml").write_text(text)
    done = plain_server.run(*COMMANDS["merge"], cwd=folder)
    _check(done)
    assert done["code"] == 2 and not (folder / "out").exists()


# --- mutated files ----------------------------------------------------------------------------------------------------

TOKENS = [
    b"0",
    b"-1",
    b"1e400",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"99999999999",
    b"*a",
    b"&a ",
    b"!!int ",
    b"\xff",
    b"\0",
]
MUTATED = {
    "measure": ["pair.yaml", "rows.jsonl", "base/config.json", "code/tokenizer_config.json", "base/tokenizer.json", "code/model.safetensors"],
    "decide": ["pair.yaml", "dfs/manifest.json", "dfs/norms.csv", "dfs/code_delta.csv", "base/config.json"],
    "merge": ["recipe.yaml", "merged/base/config.json", "merged/code/config.json", "merged/base/generation_config.json", "merged/base/tokenizer_config.json", "merged/code/model.safetensors"],
}  # fmt: skip


def _mutated(content: bytes, random: random.Random, header_only: bool) -> bytes:
    """A few bytes replaced, removed, doubled, or exchanged for what parsers stumble over."""
    for _ in range(random.randint(1, 3)):
        place = random.randrange(min(len(content), 2000) if header_only else len(content))
        span = random.randint(1, 12)
        kind = random.randrange(4)
        new = [
            b"",
            bytes(random.randrange(256) for _ in range(span)),
            content[place : place + span] * 2,
            random.choice(TOKENS),
        ][kind]
        content = content[:place] + new + content[place + span :]
    return content


def _fuzz(server, folder: Path, command: str, count: int, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(count):
        name = chance.choice(MUTATED[command])
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(_mutated(before, chance, name.endswith(".safetensors")))
        try:
            words = (
                [*COMMANDS[command], "--accept_edited"]
                if command == "decide" and chance.random() < 0.7
                else COMMANDS[command]
            )
            _check(server.run(*words, cwd=folder, memory_mb=2000), (seed, number, name, path.read_bytes()[:3000]))
        finally:
            path.write_bytes(before)
            shutil.rmtree(folder / "out", ignore_errors=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_few_mutated_files(plain_server, folder, command):
    _fuzz(plain_server, folder, command, 8, seed=1)


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("command", COMMANDS)
def test_many_mutated_files(plain_server, folder, command, part):
    _fuzz(plain_server, folder, command, 334, seed=100 + part)
