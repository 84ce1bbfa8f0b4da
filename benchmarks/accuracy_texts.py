"""The text of the accuracy benchmark: prompts and answers of GSM8K and MBPP, in the one format that experts are trained in,
measured on and asked in; and the files that the commands and lm-eval read.

A prompt is the question, of MBPP with the tests that the code should pass; the answer follows in the next line. No row that
is trained on shares its question, its answer or its whole text with one that is measured or judged on.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_texts import Row, published_pools, row_key, separate
from utils.pair.calibration import row_order
from utils.pair.source import CalibrationSource

CALIBRATION, VALIDATION = 48, 64  # rows of each task
LONGEST_PROMPT = 800  # characters; five of MBPP's 500 test rows have more, up to 4293, the padding of all others then
LOSS_ROWS = 256  # test rows of each task that losses are of, at most
ORDER = 0  # the seed of the draw of rows that are judged on
PARTS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class TaskRows:
    """One task: what its expert is trained on, what guidance reads, what settings are chosen on, what it is judged on."""

    train: tuple[Row, ...]
    calibration: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


def prompt(row: Row) -> str:
    """What a model is asked; the answer follows."""
    return "\n".join([row.question, *row.checks]) + "\n"


def rows_of(data: Path, seed: int, train: int | None = None, test: int | None = None) -> dict[str, TaskRows]:
    """The rows of both tasks. Test rows are the published ones in their order, but for prompts that are too long.

    Args:
        data: the folder of the published data sets.
        seed: of the draw of calibration rows.
        train: at most so many rows to train on, and as many to measure on; None: all there are.
        test: at most so many to choose and to judge on.

    Raises:
        UserError: `data` lacks a file or holds other columns than the published data sets.
    """
    found = {}
    for task, (test_pool, validation_pool, train_pool) in published_pools(data).items():
        _, validation, training = separate([test_pool, validation_pool, train_pool])
        random.Random(seed).shuffle(training)
        asked = [row for row in test_pool if len(prompt(row)) <= LONGEST_PROMPT]
        few = slice(0, CALIBRATION if train is None else min(CALIBRATION, train))
        found[task] = TaskRows(
            train=tuple(training[few.stop :][:train]),
            calibration=tuple(training[few]),
            validation=tuple(validation[: VALIDATION if test is None else min(VALIDATION, test)]),
            test=tuple(asked[:test]),
        )
    return found


def assert_apart(tasks: Mapping[str, TaskRows]) -> None:
    """Raise `AssertionError` if a row that is trained on is measured, chosen or judged on, of whichever task."""
    held_out = {
        row_key(text)
        for rows in tasks.values()
        for row in (*rows.calibration, *rows.validation, *rows.test)
        for text in (row.question, prompt(row) + row.answer)
    }
    for rows in tasks.values():
        for row in rows.train:
            if row_key(row.question) in held_out or row_key(prompt(row) + row.answer) in held_out:
                raise AssertionError(f"a row of the training text is held out as well: {row.question}")


def write_texts(tasks: Mapping[str, TaskRows], folder: Path) -> None:
    """A file for each part of each task (`file_of`), a row a line: `prompt`, `answer`, and the tests of an answer that is
    code (`test_list`). Losses are of the first `LOSS_ROWS` test rows, in one file with the validation rows (`judged`)."""
    for task, rows in tasks.items():
        judged = taken_first(rows.validation, rows.test[:LOSS_ROWS])
        parts = {"train": rows.train, "calibration": rows.calibration, "judged": judged, "test": rows.test}
        for part, own in parts.items():
            lines = [
                {"prompt": prompt(row), "answer": row.answer} | ({"test_list": list(row.checks)} if row.checks else {})
                for row in own
            ]
            file = file_of(folder, task, part)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def taken_first(validation: Sequence[Row], test: Sequence[Row]) -> list[Row]:
    """Rows laid out so that the evaluator, which draws from one file, takes those for choosing first."""
    rows = [*validation, *test]
    order = row_order(CalibrationSource(path="judged.jsonl", seed=ORDER), len(rows))
    found = dict(zip(order, rows, strict=True))
    return [found[place] for place in range(len(rows))]


def file_of(folder: Path, task: str, part: str) -> Path:
    """Where `write_texts` writes a part: `train`, `calibration`, `judged` or `test`."""
    return folder / task / f"{part}.jsonl"


def training_texts(file: Path, end: str) -> list[str]:
    """The rows of a file of `write_texts`, each as it is trained on: `end` says that the answer is over."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] + row["answer"] + end for row in rows]


def lm_eval_task(task: str, shipped: Path, test: Path, end: str, new_tokens: int) -> dict[str, Any]:
    """A task file of lm-eval's: the shipped one, asked without examples in the experts' own format.

    Args:
        task: which.
        shipped: the folder of the task files that come with the evaluator.
        test: the rows.
        end: the text of the token that ends an answer.
        new_tokens: of an answer, at most.
    """
    return {
        "include": str(shipped / f"{task}.yaml"),
        "task": f"{task}_own_format",
        "dataset_kwargs": {"data_files": {"test": str(test)}},
        "training_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [end], "do_sample": False, "max_gen_toks": new_tokens},
    }


def pair_config(
    models: Mapping[str, Path], texts: Path, accuracy: Mapping[str, Path], end: str, samples: int, seqlen: int
) -> dict[str, Any]:
    """The pair config that all commands read.

    Args:
        models: base and experts, by type; an expert's type is its task.
        texts: the folder of `write_texts`.
        accuracy: each task's file for lm-eval.
        end: the text of the token that ends an answer.
        samples: calibration rows of each expert.
        seqlen: tokens of a row, at most.
    """
    text = {"text": f"{{prompt}}{{answer}}{end}", "seqlen": seqlen}
    judged = {**text, "answer": f"{{answer}}{end}", "seed": ORDER}
    return {
        "model_info": [{"name": str(folder), "type": name} for name, folder in models.items()],
        "calibration": {task: {"path": str(file_of(texts, task, "calibration")), **text} for task in accuracy},
        "evaluation": {
            task: {**judged, "path": str(file_of(texts, task, "judged")), "lm_eval": [str(file)]}
            for task, file in accuracy.items()
        },
        "nsamples": samples,
    }


def shown(tasks: Mapping[str, TaskRows]) -> Sequence[str]:
    """A line for each task: how many rows of each part."""
    return [
        f"{task}: " + ", ".join(f"{len(getattr(rows, part))} {part}" for part in PARTS) + " rows"
        for task, rows in tasks.items()
    ]
