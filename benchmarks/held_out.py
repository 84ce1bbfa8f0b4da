"""Shares of an expert's held-out gain that merges of the quality benchmark's models keep, by the evaluator's scoring.

No merged model is written: recipes are scored in passes over the inputs, and losses are kept beside the pair, so that a run
that was cut off goes on where it was.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.quality_pairs import LONGEST, Pair
from benchmarks.quality_texts import Texts
from utils.evaluation.candidates import Candidate, models_of_pair
from utils.evaluation.figures import task_losses
from utils.evaluation.score_settings import ScoreSettings
from utils.evaluation.scoring import Scorer
from utils.evaluation.store import LossStore, score_new
from utils.evaluation.tasks import TEST, VALIDATION, Row, Task

_AT_ONCE = 8  # candidates in a pass, after which their losses are kept
ROWS = {VALIDATION: 40, TEST: 40}  # of each task


class HeldOut:
    """Scores recipes of one pair on its tasks' validation or test rows."""

    def __init__(self, pair: Pair, texts: Texts, rows: Mapping[str, int] = ROWS) -> None:
        """Encode the rows; `rows` says how many of each part are read per task."""
        self.config = pair.configs[pair.both]
        self.tasks = [
            Task(
                task,
                LONGEST,
                tuple(
                    Row(part, f"{part}:{number}", "", text)
                    for part, count in rows.items()
                    for number, text in enumerate(getattr(own, part)[:count])
                ),
                (task,),
            )
            for task, own in texts.tasks.items()
        ]
        settings = ScoreSettings(torch.device("cpu"), most_at_once=_AT_ONCE, scratch=pair.folder)
        self.scorer, self.store = Scorer(self.config, self.tasks, settings), LossStore(pair.folder / "losses")

    def shares(self, recipes: Mapping[str, Path], part: str, only: str | None = None) -> dict[str, dict[str, float]]:
        """By recipe and task, the share of the task's expert's gain over the base that the recipe's merge keeps.

        `only` names one task, if the others are of no interest.
        """
        candidates = [
            Candidate(name, recipe=yaml.safe_load(path.read_text(encoding="utf-8")), folder=path.parent)
            for name, path in recipes.items()
        ]
        models = models_of_pair(self.config)
        rows = {task.name: task.part(part) for task in self.tasks if only in (None, task.name)}
        table, _ = score_new(self.scorer, self.store, [*models, *candidates], rows)
        found = task_losses(table, self.tasks, self.config.base.type, [entry.type for entry in self.config.experts])
        gains = {task: dict(zip(losses.names, losses.gain().tolist(), strict=True)) for task, losses in found.items()}
        return {one.name: {task: gains[task][one.name] for task in gains} for one in candidates}


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and half its 95 % interval (Student's); infinite for one seed."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, float("inf")
    return mean, float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
