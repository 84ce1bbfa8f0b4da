"""Command 2's order of work.

python -m pytest tests/commands/test_decide.py
"""

import os

from tests.refusals import refused
from tests.tiny_pairs import CALIBRATION, save_pair, write_config
from tests.tiny_recipes import decide_here, measure_here
from utils.commands.decide import publish_changed
from utils.models.model_trial import ModelTrial
from utils.recipes.naming import LocalModels
from utils.recipes.recipe_manifest import manifest_name


def test_models_are_tried_before_anything_is_built_of_them(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    write_config(pair, {"calibration": CALIBRATION})
    monkeypatch.chdir(pair)
    measure_here("lewis")
    order = []
    built, tried = LocalModels.checkpoints.func, ModelTrial.check

    def noted(what, then):
        def note(self):
            order.append(what)
            return then(self)

        return note

    monkeypatch.setattr(LocalModels, "checkpoints", property(noted("built", built)))
    monkeypatch.setattr(ModelTrial, "check", noted("tried", tried))
    decide_here("lewis")
    assert order[0] == "tried" and "built" in order


def test_a_pipe_in_the_place_of_a_recipes_manifest(tmp_path):
    os.mkfifo(tmp_path / "a.manifest.json")
    (tmp_path / "a.yaml").write_bytes(b"recipe")
    with refused("out-in-the-way"):
        publish_changed(tmp_path, {"a.yaml": b"recipe", manifest_name("a.yaml"): b"{}"}, overwrite=True)
