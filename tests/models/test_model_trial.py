"""Which of several models' small files are tried, and which are the very same ones again.

python -m pytest tests/models/test_model_trial.py
"""

import shutil

import pytest

from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import edit_json, save_tokenizer
from utils.models import model_trial
from utils.models.model_trial import ModelTrial


@pytest.mark.parametrize(("key", "value", "tokenizers"), [("model_type", "mistral", 2), ("hidden_act", "gelu", 1)])
def test_equal_tokenizers_count_once(tmp_path, monkeypatch, key, value, tokenizers):
    one, other = tmp_path / "one", tmp_path / "other"
    save_tiny("llama", one)
    save_tokenizer(one)
    shutil.copytree(one, other)
    edit_json(other / "config.json", **{key: value})
    works, begun = [], []
    monkeypatch.setattr(model_trial, "Trial", works.append)
    ModelTrial([("one", one), ("other", other)])
    works[0](lambda step, size: begun.append(step))
    assert sum("loading its config.json" in step for step in begun) == 2
    assert sum("loading its tokenizer" in step for step in begun) == tokenizers
