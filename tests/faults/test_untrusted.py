"""Models, configs and recipes that somebody made to do harm: success or one message, in seconds, with little memory.

python -m pytest tests/faults/test_untrusted.py -m slow
"""

import json
import os
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


@pytest.mark.parametrize(
    ("command", "attack"),
    [(command, attack) for command in COMMANDS for attack in (*ATTACKS, *(() if command == "decide" else SLOW))],
)
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
