"""What was scored and what came out: contenders, their scores on each task, their standings over all tasks."""

import math
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a contender is there for."""

    BASE = "base"
    EXPERT = "expert"
    CONTROL = "control"
    CANDIDATE = "candidate"


class Outcome(StrEnum):
    """What a paired comparison says of the first of two."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "no difference seen"


@dataclass(frozen=True)
class Contender:
    """A model or recipe that was scored. `name` is unique on the page; `note` says what it is in a few words."""

    name: str
    role: Role
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95% interval, where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether the number is known and finite."""
        return is_known(self.value)

    @property
    def bounded(self) -> bool:
        """Whether both ends of the interval are known and finite."""
        return is_known(self.low) and is_known(self.high)


def is_known(value: float | None) -> bool:
    """Whether a number is there and finite."""
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Score:
    """How one contender did on one task.

    Args:
        value: in the task's unit, with its own interval if there is one.
        difference: this contender's value less the reference's, with the interval of the paired differences.
        p: of that difference; 0.05 or more is no difference seen, whatever the interval says.
        gain: share of the expert's gain over the base that is kept: 0 as the base, 1 as the expert.
        perplexity: where the value is a loss per token.
    """

    contender: str
    value: Estimate
    difference: Estimate | None = None
    p: float | None = None
    gain: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub that a task's rows come from: its id, configuration, split and revision."""

    id: str
    split: str = ""
    config: str = ""
    revision: str = ""


@dataclass(frozen=True)
class TaskScores:
    """Everything that was scored on one task.

    Args:
        name: the task.
        measure: what the numbers are, with their unit: "loss, nats per token", "accuracy, exact match".
        higher_is_better: False for a loss.
        scores: one per contender, at most; any order.
        rows: how many rows were scored.
        percent: the values are shares, shown as percentages.
        note: one sentence about the text or the scoring.
        dataset: where the rows come from, if that is the hub.
        metric: the hub's name of what `value` is ("accuracy", "exact_match"), if it has one; a loss has none.
    """

    name: str
    measure: str
    higher_is_better: bool
    scores: tuple[Score, ...]
    rows: int | None = None
    percent: bool = False
    note: str = ""
    dataset: HubDataset | None = None
    metric: str = ""


@dataclass(frozen=True)
class Standing:
    """How one contender did over all tasks.

    Args:
        gain: share of the experts' gain over the base that is kept, mean over tasks: 0 as the base, 1 as the experts.
        difference: `gain` less the reference's, with the interval of the paired differences.
        p: of that difference, corrected for the number of candidates where there are several.
        worst, worst_task: the least share among the tasks, and where.
        forgetting: loss on general text less the base's, in nats per token: above 0 is worse than the base.
    """

    contender: str
    gain: Estimate
    difference: Estimate | None = None
    p: float | None = None
    worst: float | None = None
    worst_task: str = ""
    forgetting: Estimate | None = None
