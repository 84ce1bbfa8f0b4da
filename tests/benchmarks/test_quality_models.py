"""The quality benchmark's training: cached by what made it, complete or absent, the same each time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quality_models, quality_training
from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_models import MADE, Training, train_or_find
from benchmarks.quality_texts import TaskTexts, Texts
from demo.small_model import Shape

TINY = Training(Shape(300, 16, 32, 1, 2), window=16, base_steps=3, expert_steps=2)


def texts(word: str = "seven") -> Texts:
    rows = {name: tuple(f"{name} has {word} {number} of them" for number in range(12)) for name in ("one", "two")}
    tasks = {name: TaskTexts(own, ("cal",), ("val",), ("test",)) for name, own in rows.items()}
    return Texts(rows["one"] + rows["two"], tasks, "a test")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_is_trained_is_found_and_never_trained_again(tmp_path, monkeypatch):
    first = train_or_find(TINY, texts(), 0, tmp_path)
    monkeypatch.setattr(quality_models, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    assert train_or_find(TINY, texts(), 0, tmp_path) == first
    assert set(first.experts) == {"one", "two"}
    base, expert = weights(first.base), weights(first.experts["one"])
    assert {tensor.dtype for tensor in base.values()} == {torch.float32}
    assert any(not torch.equal(base[name], expert[name]) for name in base)


@pytest.mark.parametrize(
    "changed",
    [
        (replace(TINY, expert_rate=1e-4), texts(), 0),
        (replace(TINY, shape=replace(TINY.shape, blocks=2)), texts(), 0),
        (TINY, texts("eight"), 0),
        (TINY, texts(), 1),
    ],
)
def test_whatever_decides_the_models_decides_the_folder(tmp_path, changed):
    first = train_or_find(TINY, texts(), 0, tmp_path)
    assert train_or_find(*changed, tmp_path) != first


def test_experts_that_are_trained_longer_start_from_the_same_base_which_is_trained_once(tmp_path, monkeypatch):
    long = replace(TINY, expert_steps=6)
    apart = train_or_find(long, texts(), 0, tmp_path / "apart")
    short, fitted = train_or_find(TINY, texts(), 0, tmp_path / "shared"), []

    def fit(*args, name, **kwargs):
        fitted.append(name)
        return quality_training.fit(*args, name=name, **kwargs)

    monkeypatch.setattr(quality_models, "fit", fit)
    shared = train_or_find(long, texts(), 0, tmp_path / "shared")
    assert fitted == ["one", "two"] and shared.base.parent != short.base.parent
    for one, two in zip((apart.base, *apart.experts.values()), (shared.base, *shared.experts.values()), strict=True):
        assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())
    losses = [json.loads((found.base.parent / MADE).read_text())["losses"] for found in (apart, shared)]
    assert losses[0] == losses[1]


def test_training_again_gives_the_same_bits(tmp_path):
    one, two = (train_or_find(TINY, texts(), 0, tmp_path / name).experts["two"] for name in "ab")
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_that_is_cut_goes_on_and_gives_the_same_bits(tmp_path):
    """Each run has time for one step."""
    whole = train_or_find(TINY, texts(), 0, tmp_path / "whole")
    for _ in range(4):  # 3 + 2 + 2 steps, one a run, but that the last of a model goes on to the next one
        with pytest.raises(OutOfTimeError):
            train_or_find(TINY, texts(), 0, tmp_path / "cut", until=0.0)
    cut = train_or_find(TINY, texts(), 0, tmp_path / "cut", until=0.0)
    for one, two in zip((whole.base, *whole.experts.values()), (cut.base, *cut.experts.values()), strict=True):
        assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())
    made = json.loads((cut.base.parent / MADE).read_text())
    assert made["losses"] == json.loads((whole.base.parent / MADE).read_text())["losses"]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [cut.base.parent.name]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_models, "fit", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_or_find(TINY, texts(), 0, tmp_path)
    assert not list(tmp_path.rglob(MADE)) and not list(tmp_path.iterdir())
