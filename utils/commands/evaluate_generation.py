"""What the evaluator needs whole models for, one in memory at a time: answers to held-out prompts, lm-eval's tasks."""

from collections.abc import Callable, Sequence

import pandas as pd

from utils.commands.evaluated import Evaluated, Generated
from utils.errors import UserError
from utils.evaluation.answers import expected, greedy_answers, prompts_of, shown
from utils.evaluation.candidates import Candidate
from utils.evaluation.lm_eval_scores import COLUMNS, FIGURES, Accuracy, AccuracyTasks, joined
from utils.evaluation.lm_eval_scores import accuracy as run_tasks
from utils.evaluation.lm_eval_side_by_side import accuracy_side_by_side
from utils.evaluation.scoring import Scorer
from utils.evaluation.store import LossStore
from utils.evaluation.tasks import Row
from utils.evaluation.whole_models import whole_model
from utils.publishing.manifest import sha256_of
from utils.runtime import available_bytes, gigabytes

_NOT_FINITE = "merge-not-finite"
_NO_PROMPTS = (
    "No held-out prompts are answered, since the whole of each row counts: answer, under a task of evaluation, says which part "
    "of a row is the answer to the rest."
)


def generate(
    scorer: Scorer,
    evaluated: Evaluated,
    store: LossStore,
    accuracy: AccuracyTasks | None,
    *,
    answers: bool,
    batch_size: int | None = None,
    say: Callable[[str], None],
) -> Generated:
    """Have whole models do what losses do not show; what the store has is not done again.

    Everybody does lm-eval's tasks, `batch_size` prompts at a time (needed where there are tasks). Base, experts, the reference and the best candidate answer up to 8 test prompts.
    """
    prompts = prompts_of(scorer.tasks) if answers else []
    notes = () if prompts or not answers else (_NO_PROMPTS,)
    speakers = _speakers(evaluated) if prompts else set()
    warnings, tables, said = [], [], {}
    for one in evaluated.candidates:
        wanted = [row for _, row in prompts] if one.name in speakers else []
        if not wanted and accuracy is None:
            continue
        try:
            table, found = _work(scorer, one, store, accuracy, batch_size, wanted, say)
        except UserError as error:
            if _NOT_FINITE not in error.codes and "evaluate-no-room" not in error.codes:
                raise
            warnings.append(f"{one.name} answers no prompts and does no lm-eval task: {error}")
            continue
        if table is not None:
            tables.append(table)
        if found:
            said[one.name] = found
    together = [
        (task, shown(row), expected(row), {name: found[place] for name, found in said.items()})
        for place, (task, row) in enumerate(prompts)
    ]
    return Generated(
        tuple(each for each in together if each[3]),
        joined(tables) if tables else None,
        tuple(warnings),
        notes,
    )


def do_tasks_side_by_side(
    scorers: Sequence[Scorer],
    evaluated: Evaluated,
    store: LossStore,
    accuracy: AccuracyTasks,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    """Have everybody whose results the store lacks do lm-eval's tasks, on all devices at a time; the store has them then.

    Who fails is left to `generate`, which has the device to itself.
    """
    keys = {one.name: _task_key(scorers[0], one, accuracy, batch_size) for one in evaluated.candidates}
    wanted = [one for one in evaluated.candidates if store.find_record(keys[one.name]) is None]
    for line in accuracy_side_by_side(
        scorers,
        wanted,
        accuracy,
        batch_size,
        lambda one: say(f"{one.name} does {', '.join(accuracy.names)}"),
        lambda one, table: store.keep_record(keys[one.name], _plain(one, table)),
    ):
        say(line)


def _speakers(evaluated: Evaluated) -> set[str]:
    """Who answers prompts: base, experts, whom differences are taken against, the best uniform merge and the winner."""
    names = {one.name for one in evaluated.candidates if one.role in ("base", "expert")}
    best = evaluated.best_uniform
    return names | {evaluated.winner or "", evaluated.reference or "", best.name if best else ""}


def _work(
    scorer: Scorer,
    one: Candidate,
    store: LossStore,
    accuracy: AccuracyTasks | None,
    batch_size: int | None,
    rows: Sequence[Row],
    say: Callable[[str], None],
) -> tuple:
    """One candidate's table of lm-eval results and its answers, from the store or from its model."""
    mark = [scorer.fingerprint(one), scorer.settings.record()]
    task_key = _task_key(scorer, one, accuracy, batch_size) if accuracy else ""
    answer_key = _key("answers", *mark, [row.digest for row in rows])
    kept_tasks = store.find_record(task_key) if accuracy else {}
    kept_answers = store.find_record(answer_key) if rows else {}
    if kept_tasks is None or kept_answers is None:
        _refuse_too_large(scorer, one)
        with whole_model(one, scorer.preparing, scorer.settings.scratch) as whole:
            if kept_tasks is None:
                say(f"{one.name} does {', '.join(accuracy.names)}")
                kept_tasks = _plain(one, run_tasks(one.name, whole, accuracy, batch_size))
                store.keep_record(task_key, kept_tasks)
            if kept_answers is None:
                say(f"{one.name} answers {len(rows)} prompts")
                kept_answers = {"answers": greedy_answers(whole, rows)}
                store.keep_record(answer_key, {"candidate": one.name, **kept_answers})
    if not accuracy:
        return None, kept_answers.get("answers", [])
    samples = pd.DataFrame([(one.name, *row) for row in kept_tasks["rows"]], columns=list(COLUMNS))
    figures = pd.DataFrame([(one.name, *row) for row in kept_tasks["figures"]], columns=list(FIGURES))
    return Accuracy(samples, figures), kept_answers.get("answers", [])


def _task_key(scorer: Scorer, one: Candidate, accuracy: AccuracyTasks, batch_size: int | None) -> str:
    """The store's key of a candidate's results; the batch counts, since sums of 16-bit numbers depend on it."""
    return _key("lm-eval", scorer.fingerprint(one), scorer.settings.record(), accuracy.digest, batch_size)


def _plain(one: Candidate, table: Accuracy) -> dict[str, object]:
    """A candidate's results as the store keeps them."""
    return {
        "candidate": one.name,
        "rows": table.samples[list(COLUMNS[1:])].values.tolist(),
        "figures": table.figures[list(FIGURES[1:])].values.tolist(),
    }


def _refuse_too_large(scorer: Scorer, one: Candidate) -> None:
    """Raise a `UserError` if a whole model of the pair's size does not fit into the memory that is free."""
    needed = max(checkpoint.total_bytes for checkpoint in scorer.inputs.values())
    free = available_bytes(scorer.settings.device)
    if needed * 1.2 > free:
        raise UserError(
            f"its whole model takes {gigabytes(needed)} and {gigabytes(free)} are free; give --no-samples, or a larger device",
            "evaluate-no-room",
        )


def _key(*parts: object) -> str:
    return sha256_of(parts)
