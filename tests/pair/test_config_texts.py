"""The texts of a pair config: for all experts, for each, to evaluate on, and of no expert.

python -m pytest tests/pair/test_config_texts.py
"""

from pathlib import Path

import pytest
import yaml

from tests.refusals import refused
from tests.tiny_pairs import pair_settings, write_config
from utils.pair.config import PairConfig, read_pair_config
from utils.pair.evaluation import EvaluationText
from utils.pair.source import CalibrationSource


def read(folder: Path, **changes) -> PairConfig:
    return read_pair_config(write_config(folder, changes))


def said(code: str, folder: Path, **changes) -> str:
    with refused(code) as caught:
        read(folder, **changes)
    return str(caught.value)


MATH_TEXT = {"path": "m.jsonl", "text": "{a}", "seed": 7}


def test_experts_may_have_texts_of_their_own(tmp_path):
    config = read(tmp_path, calibration={"math": "gsm8k"}, dataset="mbpp", seqlen=64)
    assert config.text_of("math") == CalibrationSource(name="gsm8k", seqlen=64)
    assert config.text_of("code") == config.dataset == CalibrationSource(name="mbpp", seqlen=64)
    assert set(config.texts) == {config.dataset, config.text_of("math")}
    every = read(tmp_path, calibration={"math": MATH_TEXT, "code": MATH_TEXT})
    assert every.texts == (CalibrationSource(path="m.jsonl", text="{a}", seed=7),)
    assert read(tmp_path).texts == (read(tmp_path).dataset,)


@pytest.mark.parametrize(
    ("calibration", "code", "place"),
    [
        ("gsm8k", "config-wrong-type", "calibration must map an expert's type to its text, such as {math: gsm8k}, got"),
        ({"base": "gsm8k"}, "config-base-as-expert", "calibration names"),
        ({"mathh": "gsm8k"}, "config-unknown-expert", "calibration: type 'mathh'"),
        ({1: "gsm8k"}, "config-unknown-expert", "calibration: type 1"),
        ({"math": "gsm9k"}, "config-unknown-dataset", "calibration.math.name 'gsm9k'"),
        ({"math": 3}, "config-wrong-type", "calibration.math must be a name"),
        ({"math": {"paht": "x", "name": "mbpp"}}, "config-unknown-key", "calibration.math.'paht'"),
        ({"math": {"name": "gsm8k", "seqlen": 1}}, "config-out-of-range", "calibration.math.seqlen"),
    ],
)
def test_texts_that_cannot_be_meant(tmp_path, calibration, code, place):
    assert place in said(code, tmp_path, calibration=calibration)


def test_an_expert_without_text(tmp_path):
    settings = {key: value for key, value in pair_settings().items() if key != "dataset"}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump({**settings, "calibration": {"math": "gsm8k"}}))
    with refused(
        "config-no-text", "calibration has no text for type 'code', and there is no dataset for it; add either"
    ):
        read_pair_config(tmp_path / "pair.yaml")


def test_text_of_no_expert_takes_the_defaults_of_the_others(tmp_path):
    assert read(tmp_path).general is None
    general = read(tmp_path, general="gsm8k", seqlen=64, seed=3).general
    assert general == EvaluationText(CalibrationSource(name="gsm8k", seqlen=64, seed=3), "{answer}")
    said("config-unknown-dataset", tmp_path, general="gsm9k")


def test_texts_to_evaluate_on(tmp_path):
    assert read(tmp_path).evaluation == {}
    found = read(
        tmp_path,
        seqlen=64,
        evaluation={
            "math": "gsm8k",
            "code": {"path": "a.jsonl", "text": "{p}{c}", "answer": "{c}", "split": "test", "lm_eval": "mbpp"},
            "prose": {"path": "b.jsonl", "lm_eval": ["wikitext", "my_task.yaml"]},
            "tasks": {"lm_eval": ["gsm8k"]},
        },
    ).evaluation
    assert found == {
        "math": EvaluationText(CalibrationSource(name="gsm8k", seqlen=64), "{answer}"),
        "code": EvaluationText(
            CalibrationSource(path="a.jsonl", text="{p}{c}", split="test", seqlen=64), "{c}", ("mbpp",), True
        ),
        "prose": EvaluationText(CalibrationSource(path="b.jsonl", seqlen=64), None, ("wikitext", "my_task.yaml")),
        "tasks": EvaluationText(None, None, ("gsm8k",)),
    }


@pytest.mark.parametrize(
    ("evaluation", "code", "place"),
    [
        ("gsm8k", "config-wrong-type", "evaluation must be a mapping"),
        ({"math": {}}, "config-no-text", "evaluation.math needs a name or a path"),
        ({"math": {"name": "gsm8k", "anser": "{a}"}}, "config-unknown-key", "did you mean 'answer'?"),
        ({"math": {"name": "gsm8k", "answer": 3}}, "config-wrong-type", "evaluation.math.answer must be text"),
        ({"math": {"name": "gsm8k", "lm_eval": [3]}}, "config-wrong-type", "evaluation.math.lm_eval[0] must be text"),
        ({"math": {"path": "x", "messages": "m", "answer": "{a}"}}, "config-two-answers", "remove answer"),
        ({3: "gsm8k"}, "config-wrong-type", "evaluation: key 3 must be text"),
    ],
)
def test_texts_that_nothing_can_be_evaluated_on(tmp_path, evaluation, code, place):
    assert place in said(code, tmp_path, evaluation=evaluation)
