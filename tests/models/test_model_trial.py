"""Which of several models' small files are tried, and which are the very same ones again.

python -m pytest tests/models/test_model_trial.py
"""

import json
import pickle
import shutil

import pytest
from transformers import AutoTokenizer

from tests.refusals import refused
from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import edit_json, save_tokenizer
from utils.models import model_trial
from utils.models.model_trial import ModelTrial
from utils.models.tokenizer import forget_handed_on, hand_on, load_tokenizer, tokenizer_digest
from utils.trial import allow_trials


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
    assert pickle.loads(works[0](lambda step, size: begun.append(step))) == {}  # small ones are loaded again
    assert sum("loading its config.json" in step for step in begun) == 2
    assert sum("loading its tokenizer" in step for step in begun) == tokenizers


def test_a_large_tokenizer_is_loaded_by_the_trial_alone(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    save_tokenizer(tmp_path)
    plain, text = load_tokenizer(tmp_path, "one", False), "Two and two is f\u00f6ur.\n"
    plain.chat_template = "{% for one in messages %}<{{ one.content }}>{% endfor %}"
    plain.save_pretrained(tmp_path)
    monkeypatch.setattr(model_trial, "LARGE", 0)
    allow_trials()
    try:
        ModelTrial([("one", tmp_path)]).check()
    finally:
        allow_trials(False)
    with monkeypatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", None)
        handed = load_tokenizer(tmp_path, "one", False)
    again = load_tokenizer(tmp_path, "one", False)  # handed on once
    for own in (handed, again):
        assert type(own) is type(plain) and own.get_vocab() == plain.get_vocab() and own(text) == plain(text)
        assert own.special_tokens_map == plain.special_tokens_map and own.padding_side == plain.padding_side
        assert own.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == f"<{text}>"


@pytest.mark.parametrize("made", [b"no pickle", pickle.dumps(print)[:-3], b"cno_such_module\nThing\n."])
def test_a_tokenizer_that_does_not_come_back_is_loaded(tmp_path, made):
    save_tokenizer(save_tiny("llama", tmp_path))
    digest = tokenizer_digest(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    hand_on({digest: made})
    assert load_tokenizer(tmp_path, "one", False).get_vocab()["<s>"] == 0


@pytest.mark.parametrize("how", ["not wanted", "forgotten"])
def test_nothing_is_handed_on_that_nobody_takes(tmp_path, monkeypatch, how):
    save_tokenizer(save_tiny("llama", tmp_path))
    monkeypatch.setattr(model_trial, "LARGE", 0)
    allow_trials()
    try:
        ModelTrial([("one", tmp_path)], loaded_again=how != "not wanted").check()
    finally:
        allow_trials(False)
    if how == "forgotten":
        forget_handed_on()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    with refused("tokenizer-unreadable"):
        load_tokenizer(tmp_path, "one", False)


def test_a_config_that_cannot_be_loaded_is_not_said_of_the_tokenizer(tmp_path):
    edit_json(save_tokenizer(save_tiny("llama", tmp_path)) / "config.json", use_cache="x")
    with refused("model-config-unreadable") as caught:
        load_tokenizer(tmp_path, "one", False)
    assert "expected bool, got str" in str(caught.value)
