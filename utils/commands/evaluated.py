"""What an evaluation came to, between the work and those that show it."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from utils.evaluation.candidates import Candidate
from utils.evaluation.figures import CandidateFigures


@dataclass(frozen=True)
class Generated:
    """What whole models were needed for: answers to prompts, and per-sample results of lm-eval's tasks.

    `answers` are (task, prompt, expected, answer by candidate). `warnings` say what was left out, and why.
    """

    answers: tuple[tuple[str, str, str, Mapping[str, str]], ...] = ()
    accuracy: pd.DataFrame | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """What came out: everybody in the order of the table, figures by name, losses on test rows, and who is who.

    `reference` is whom differences are taken against (None: nobody), `winner` the best on validation rows, `reference_is`
    what the reference is, in words.
    """

    candidates: tuple[Candidate, ...]
    figures: Mapping[str, CandidateFigures]
    losses: pd.DataFrame
    reference: str | None
    reference_is: str
    winner: str | None
    scored: int
    seconds: float

    def best_control(self) -> Candidate | None:
        """The uniform merge that differences are taken against, or the first one in the table; None without any."""
        controls = [one for one in self.candidates if one.role == "control"]
        return next((one for one in controls if one.name == self.reference), controls[0] if controls else None)
