"""What an evaluation came to, between the work and those that show it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from utils.evaluation.candidates import Candidate
from utils.evaluation.figures import CandidateFigures
from utils.evaluation.lm_eval_scores import Accuracy


@dataclass(frozen=True)
class Generated:
    """What whole models were needed for: answers to prompts, and results of lm-eval's tasks.

    `answers` are (task, prompt, expected, answer by candidate). `warnings` say what was left out, and why, `notes` why
    there was nothing to do.
    """

    answers: tuple[tuple[str, str, str, Mapping[str, str]], ...] = ()
    accuracy: Accuracy | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """What came out: everybody in the order of the table, figures by name, losses on test rows, and who is who.

    `reference` is whom differences are taken against (None: nobody), `reference_is` what the reference is, in words.
    `winner` and `best_uniform` are the best of all, and of the uniform merges, on validation rows. `compared` are those whose
    p-values are corrected for being several. `facts` are further things that the page says of the run, by label.
    """

    candidates: tuple[Candidate, ...]
    figures: Mapping[str, CandidateFigures]
    losses: pd.DataFrame
    reference: str | None
    reference_is: str
    winner: str | None
    best_uniform: Candidate | None
    scored: int
    seconds: float
    compared: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def by_objective(self) -> bool:
        """Whether a figure other than the mean, which a search chose by, is known of anybody."""
        return any(one.chosen_by and math.isfinite(one.chosen_by.value) for one in self.figures.values())
