"""What was scored so far, row by row, in memory; whatever scores keeps it on disk (`utils/evaluation/store.py`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from utils.evaluation.candidates import Candidate

RowsByTask = Mapping[str, Sequence[int]]
Score = Callable[[Sequence[Candidate], RowsByTask], "pd.DataFrame"]


@dataclass(frozen=True)
class Entrant:
    """A candidate as it is known across runs: `digest` says what its weights are."""

    digest: str
    candidate: Candidate


@dataclass
class Losses:
    """Losses by candidate (its digest) and row. State: what `score` was asked for so far.

    `nll` is the sum over a row's scored tokens in nats, `tokens` how many these are, both by (digest, task, row).
    """

    score: Score
    nll: dict[tuple[str, str, int], float] = field(default_factory=dict, repr=False)
    tokens: dict[tuple[str, str, int], float] = field(default_factory=dict, repr=False)

    def missing(self, entrants: Sequence[Entrant], rows: RowsByTask) -> int:
        """How many losses of these candidates on these rows are not known yet."""
        return sum(len(self._missing(digest, rows)) for digest in {entrant.digest for entrant in entrants})

    def require(self, entrants: Sequence[Entrant], rows: RowsByTask) -> None:
        """Score what is missing of these candidates on these rows: in one call all that miss the same rows."""
        groups: dict[tuple[tuple[str, int], ...], dict[str, Entrant]] = {}
        for entrant in entrants:
            if missing := tuple(self._missing(entrant.digest, rows)):
                groups.setdefault(missing, {})[entrant.digest] = entrant
        for missing, own in groups.items():
            wanted: dict[str, list[int]] = {}
            for task, row in missing:
                wanted.setdefault(task, []).append(row)
            self._score(list(own.values()), wanted)

    def table(self, digests: Sequence[str], rows: RowsByTask) -> np.ndarray:
        """Negative log-likelihoods [candidates, rows], float64, tasks one after the other."""
        places = [(task, row) for task, numbers in rows.items() for row in numbers]
        found = np.array([[self.nll[digest, *place] for place in places] for digest in digests])
        return found.reshape(len(digests), len(places))

    def sizes(self, digest: str, rows: RowsByTask) -> np.ndarray:
        """The tokens of the rows [rows] as one candidate's tokenizer counts them, float64."""
        return np.array([self.tokens[digest, task, row] for task, numbers in rows.items() for row in numbers], float)

    def _missing(self, digest: str, rows: RowsByTask) -> list[tuple[str, int]]:
        return [(task, row) for task, numbers in rows.items() for row in numbers if (digest, task, row) not in self.nll]

    def _score(self, entrants: Sequence[Entrant], rows: Mapping[str, list[int]]) -> None:
        by_name = {entrant.candidate.name: entrant.digest for entrant in entrants}
        frame = self.score([entrant.candidate for entrant in entrants], rows)
        wanted = len(entrants) * sum(map(len, rows.values()))
        if len(by_name) != len(entrants) or len(frame) != wanted:
            raise ValueError(f"{wanted} losses of {len(entrants)} candidates were asked for, {len(frame)} came")
        for name, task, row, nll, tokens in frame[["candidate", "task", "row", "nll", "tokens"]].itertuples(
            index=False
        ):
            key = (by_name[name], task, int(row))
            self.nll[key], self.tokens[key] = float(nll), float(tokens)
