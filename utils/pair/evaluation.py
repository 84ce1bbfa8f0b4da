"""The keys `evaluation` and `general` of the pair config: what candidates are evaluated on.

    evaluation:
      math: {name: gsm8k}                                            # a text as `dataset` takes it
      code: {path: rows.jsonl, text: "{text} {code}", answer: "{code}", lm_eval: [mbpp, my_task.yaml]}
    general: {path: prose.jsonl}

Without `evaluation`, every expert's own text is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from utils.errors import Problem
from utils.pair.source import CalibrationSource, Template, complete, written_out
from utils.validation import Mistakes, Text, checked

ANSWERS = {"gsm8k": "{answer}", "mbpp": "{code}"}


def _listed(raw: Any) -> Any:
    return [raw] if isinstance(raw, str) else raw


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


def text_of_calibration(source: CalibrationSource) -> EvaluationText:
    """An expert's own calibration text as a task: another split of it, where there is one."""
    return EvaluationText(source, _default_answer(source))


@checked
class _Entry(CalibrationSource):
    """An entry as it is written."""

    answer: Template | None = None
    lm_eval: Annotated[tuple[Text, ...], BeforeValidator(_listed)] = ()


def _default_answer(source: CalibrationSource) -> str | None:
    """The answer of a built-in text that is used as it comes."""
    return None if source.text or source.is_chat else ANSWERS.get(source.name or "")


def _evaluation_text(entry: _Entry) -> EvaluationText:
    if entry.name is None and entry.path is None and entry.lm_eval:
        return EvaluationText(None, None, entry.lm_eval)
    complete(entry)
    if entry.answer and entry.is_chat:
        raise Mistakes(Problem(": the last message of a chat is the answer; remove answer", "two-answers"))
    source = CalibrationSource(**{each.name: getattr(entry, each.name) for each in fields(CalibrationSource)})
    answer = entry.answer or _default_answer(source)
    return EvaluationText(source, answer, entry.lm_eval, split_given=source.split is not None)


TaskText = Annotated[_Entry, BeforeValidator(written_out), AfterValidator(_evaluation_text)]
TextByTask = Mapping[Text, TaskText]
