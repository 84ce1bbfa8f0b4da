"""The quality benchmark's merging half: choices on validation only, memory of what was judged, one seed from end to end.

python -m pytest tests/benchmarks/test_quality_seed.py -m ""
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.quality_contenders import CONTROLS, Variant, lines, one_expert, plain, two_experts
from benchmarks.quality_joint import CEILING
from benchmarks.quality_merges import TEST, VALIDATION, Judge
from benchmarks.quality_models import Trained, Training
from benchmarks.quality_pairs import lay_out
from benchmarks.quality_peer_models import peers_of_one, peers_of_two
from benchmarks.quality_report import ONE, TWO
from benchmarks.quality_seed import FIRST, Piece, chosen_variant, judge_piece
from benchmarks.quality_texts import TaskTexts, Texts
from benchmarks.quality_third import three_experts
from demo.small_model import Shape
from tests.benchmarks.published_sets import write_sets
from tests.tiny_pairs import save_pair


@pytest.fixture
def pair(tmp_path):
    save_pair(tmp_path)
    rows = tuple(f"What is {number} and {number}?" for number in range(6))
    own = TaskTexts(rows, rows, rows[:3], rows[3:])
    texts = Texts(rows, {"code": own, "math": own}, "a test")
    trained = Trained(tmp_path / "base", {name: tmp_path / name for name in ("code", "math")})
    return lay_out(trained, texts, tmp_path / "work"), texts


def test_settings_are_chosen_without_a_look_at_the_test_split(pair, monkeypatch):
    place, texts = pair
    judge = Judge(place, texts, {VALIDATION: 3, TEST: 3}, "cpu")
    asked = []
    losses = {"first": 3.0, "second": 2.0, "third": 2.5}

    def judged(self, recipe, split):
        asked.append(split)
        return dict.fromkeys(texts.tasks, losses[recipe.name])

    monkeypatch.setattr(Judge, "recipe_losses", judged)
    monkeypatch.setattr(
        Judge,
        "model_losses",
        lambda self, folder, split: dict.fromkeys(texts.tasks, 4.0 if folder.name == "base" else 1.0),
    )
    variants = [Variant(name, lambda pair, device, name=name: Path(name)) for name in losses]
    assert chosen_variant(judge, place, variants, "cpu").setting == "second"
    assert set(asked) == {VALIDATION}


def test_what_was_judged_is_remembered_until_recipe_or_text_change(pair, monkeypatch):
    place, texts = pair
    merged = []

    def losses(self, folder, split):
        merged.append(split)
        return dict.fromkeys(texts.tasks, 1.0)

    monkeypatch.setattr(Judge, "measured_losses", losses)
    recipe = plain("task_arithmetic", weight=0.5).recipe(place, "cpu")
    for rows in (3, 3, 2):
        Judge(place, texts, {VALIDATION: rows, TEST: 3}, "cpu").recipe_losses(recipe, VALIDATION)
    assert len(merged) == 2
    other = plain("task_arithmetic", weight=0.25).recipe(place, "cpu")
    Judge(place, texts, {VALIDATION: 3, TEST: 3}, "cpu").recipe_losses(other, VALIDATION)
    assert len(merged) == 3


def test_a_judged_merge_is_the_mean_loss_of_the_dense_sum(pair):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from benchmarks.quality_losses import mean_loss

    place, texts = pair
    judge = Judge(place, texts, {VALIDATION: 3, TEST: 3}, "cpu")
    found = judge.recipe_losses(plain("task_arithmetic", weight=0.5).recipe(place, "cpu"), TEST)
    base, *experts = (
        load_file(folder / "model.safetensors") for folder in (place.trained.base, *place.trained.experts.values())
    )
    model = AutoModelForCausalLM.from_pretrained(place.trained.base, dtype=torch.float32).eval()
    dense = {
        name: tensor.float() + sum(0.5 * (one[name].float() - tensor.float()) for one in experts)
        for name, tensor in base.items()
    }
    model.load_state_dict(dense, strict=False)
    for task in texts.tasks:
        assert found[task] == pytest.approx(mean_loss(model, judge.rows[TEST, task]), abs=0.02)


def test_lines_grow_with_depth_and_hold_outside_the_blocks(pair):
    place, _ = pair
    recipe = yaml.safe_load(lines(0.1, 0.4).recipe(place, "cpu").read_text())
    weights = recipe["models"][1]["parameters"]["weight"]
    assert [entry["value"] for entry in weights] == pytest.approx([0.1, 0.5, 0.5, 0.1])
    assert [entry.get("filter") for entry in weights] == ["model.layers.0.", "model.layers.1.", "model.norm", None]


def test_every_contender_has_its_control():
    assert CONTROLS[ONE] in one_expert("math", 0.1) and CONTROLS[TWO] in two_experts()
    assert all(variants for variants in two_experts().values())


@pytest.mark.slow
def test_one_seed_from_training_to_figures(tmp_path):
    training = Training(
        Shape(vocabulary=512, hidden=32, intermediate=64, blocks=2, heads=2), window=64, base_steps=30, expert_steps=60
    )
    write_sets(tmp_path, rows=120)
    own = Piece("tiny", training, 0, 2, tmp_path, tmp_path, "cpu", {VALIDATION: 4, TEST: 4})
    assert judge_piece(dataclasses.replace(own, until=0.0)).stopped_before
    found = {experts: judge_piece(dataclasses.replace(own, experts=experts)) for experts in (1, 2, 3)}
    assert not any(one.failed or one.stopped_before for one in found.values())
    tasks = {figure.task for figure in found[2].figures}
    named = [figure.contender for figure in found[2].figures][:: len(tasks)]
    assert tuple(named[: len(FIRST)]) == FIRST
    assert sorted(named) == sorted([CEILING, *two_experts(), *peers_of_two()])
    one = one_expert("mbpp", 0.1) | peers_of_one("mbpp", 0.1)
    assert len(found[1].figures) == len(tasks) * 4 * len(one)
    assert len(found[3].figures) == (len(tasks) + 1) * (len(three_experts()) + 1)
    for experts, first in found.items():
        again = judge_piece(dataclasses.replace(own, experts=experts, until=0.0))  # all of it is remembered
        assert again.seconds >= first.seconds > 0
        assert [dataclasses.asdict(figure) for figure in again.figures] == [
            dataclasses.asdict(figure) for figure in first.figures
        ]
