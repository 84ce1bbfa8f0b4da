"""The keys `evaluation` and `general` of the pair config: what candidates are evaluated on.

    evaluation:
      math: {name: gsm8k}                                            # a text as `dataset` takes it
      code: {path: rows.jsonl, text: "{text} {code}", answer: "{code}", lm_eval: [mbpp, my_task.yaml]}
    general: {path: prose.jsonl}

Without `evaluation`, every expert's own text is taken.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import raise_collected
from utils.pair.config import PairConfig
from utils.pair.source import DATASET_KEYS, CalibrationSource, read_source, unknown_keys
from utils.plain_values import is_text, show

ANSWERS = {"gsm8k": "{answer}", "mbpp": "{code}"}
_OWN_KEYS = ("answer", "lm_eval")


@dataclass(frozen=True)
class EvaluationText:
    """One entry of `evaluation`: a text (None where only lm-eval tasks are asked for), and what of it counts.

    `answer` is the template of the part of a row whose tokens the loss counts, None for all of it. `lm_eval` are names
    of tasks of lm-eval's, or YAML files. `split_given` says whether the user chose the split.
    """

    source: CalibrationSource | None
    answer: str | None
    lm_eval: tuple[str, ...] = ()
    split_given: bool = False


def evaluation_of(config: PairConfig) -> dict[str, EvaluationText]:
    """The entries of `evaluation` by task; empty where the key is left out.

    Raises:
        UserError: slips in it, all together.
    """
    raw = config.evaluation
    if raw is None:
        return {}
    problems: list[str] = []
    found = {}
    if not isinstance(raw, Mapping) or not raw:
        problems.append(f"evaluation must map a task to its text, such as {{math: gsm8k}}, got {show(raw)}")
    else:
        for name, value in raw.items():
            if not is_text(name):
                problems.append(f"evaluation: task {show(name)} must be text")
                continue
            found[name] = _entry(value, f"evaluation.{name}", config.dataset, problems)
    raise_collected(problems, f"pair config {config.path}")
    return found


def general_of(config: PairConfig) -> EvaluationText | None:
    """The text of `general`, on which forgetting is measured; None where the key is left out.

    Raises:
        UserError: slips in it, all together.
    """
    if config.general is None:
        return None
    problems: list[str] = []
    found = _entry(config.general, "general", config.dataset, problems)
    raise_collected(problems, f"pair config {config.path}")
    return found


def text_of_calibration(source: CalibrationSource) -> EvaluationText:
    """An expert's own calibration text as a task: another split of it, where there is one."""
    return EvaluationText(source, _default_answer(source), (), False)


def _entry(raw: Any, key: str, default: CalibrationSource, problems: list[str]) -> EvaluationText:
    if is_text(raw):
        raw = {"name": raw}
    if not isinstance(raw, Mapping):
        problems.append(f"{key} must be a text as dataset takes it, got {show(raw)}")
        return EvaluationText(None, None)
    problems += unknown_keys(raw, (*DATASET_KEYS, *_OWN_KEYS), f"{key}.")
    tasks = raw.get("lm_eval", [])
    tasks = [tasks] if is_text(tasks) else tasks
    if not isinstance(tasks, list) or not all(map(is_text, tasks)):
        problems.append(f"{key}.lm_eval must list task names or YAML files, got {show(tasks)}")
        tasks = []
    answer = raw.get("answer")
    if answer is not None and not is_text(answer):
        problems.append(f"{key}.answer must be a template such as '{{answer}}', got {show(answer)}")
        answer = None
    own = {name: value for name, value in raw.items() if name in DATASET_KEYS}
    if not own and tasks:
        return EvaluationText(None, None, tuple(tasks))
    source = read_source(own, key, default.seed, default.seqlen, problems)
    if answer is None:
        answer = _default_answer(source)
    elif source.messages:
        problems.append(f"{key}: with messages the last one is the answer; remove answer")
    return EvaluationText(source, answer, tuple(tasks), source.split is not None)


def _default_answer(source: CalibrationSource) -> str | None:
    """The answer of a built-in text that is used as it comes."""
    plain = dataclasses.replace(source, name=None, seed=0, seqlen=0)
    return ANSWERS.get(source.name or "") if not (plain.text or plain.messages) else None
