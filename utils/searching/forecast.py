"""What a search will take, from what its first round took: time, disk, memory. Plain numbers in, plain numbers out."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How long scoring takes: `weights` seconds for a candidate's merge in one pass, `row` seconds for one row of it."""

    weights: float
    row: float

    @classmethod
    def measured(cls, weights: float, forward: float, candidates: int, losses: int) -> "Pace":
        """From the seconds of one round: merging and reading, forward passes; its candidates, and losses in all."""
        return cls(weights / max(1, candidates), forward / max(1, losses))

    def seconds(self, candidates: int, losses: int) -> float:
        """What a round takes."""
        return candidates * self.weights + losses * self.row


@dataclass(frozen=True)
class Forecast:
    """Seconds that are left if all but a few of each batch leave after its first round (`low`), and if none does."""

    low: float
    high: float

    @property
    def shown(self) -> str:
        """For people."""
        return f"{duration(self.low)} to {duration(self.high)}"


def forecast(
    pace: Pace, candidates: int, batches: int, rounds: Sequence[int], at_the_end: int, test_rows: int
) -> Forecast:
    """How long the rest takes.

    Args:
        pace: as measured.
        candidates: those that will still enter a first round.
        batches: how many batches they are.
        rounds: rows seen after each round, all tasks together.
        at_the_end: candidates that are scored on test rows.
        test_rows: how many these are.
    """
    end = pace.seconds(at_the_end, at_the_end * test_rows)
    first, later = rounds[0], [after - before for before, after in itertools.pairwise(rounds)]
    few = min(batches, candidates)  # one of each batch sees every row
    low = pace.seconds(candidates, candidates * first) + sum(pace.seconds(few, few * rows) for rows in later)
    high = pace.seconds(candidates, candidates * first) + sum(
        pace.seconds(candidates, candidates * rows) for rows in later
    )
    return Forecast(low + end, high + end)


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `7 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
