"""What a report shows, as plain values: numbers, names and texts, with no model, table or file behind them.

Every part of a `Page` may be empty; what has no data is left out. A number that is not known is None or NaN and shown
as a dash. Names and texts may hold anything: they are escaped where they are written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        p: of that difference, corrected for the number of comparisons where there are several.
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
        p: of that difference, corrected where several are compared.
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


@dataclass(frozen=True)
class Verdict:
    """What the page says first. `details` are further sentences; `outcome` is None where nothing was compared."""

    sentence: str
    outcome: Outcome | None = None
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heatmap:
    """One number for each layer and component, as a recipe gives them to one expert.

    Args:
        title: whose numbers they are.
        quantity: what they are: "density", "weight".
        layers: labels of the rows, in the order of depth.
        components: labels of the columns.
        cells: one row per layer, one number per component; None where the recipe has none of its own.
    """

    title: str
    quantity: str
    layers: tuple[str, ...]
    components: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        shape = {len(row) for row in self.cells}
        if len(self.cells) != len(self.layers) or shape - {len(self.components)}:
            raise ValueError(f"{self.title}: cells are not {len(self.layers)} rows of {len(self.components)}")


@dataclass(frozen=True)
class Recipe:
    """The recipe that won, or that a folder was merged by: `facts` are pairs of label and value."""

    facts: tuple[tuple[str, str], ...] = ()
    heatmaps: tuple[Heatmap, ...] = ()
    text: str = ""


class TrialState(StrEnum):
    """How a trial of a search ended."""

    COMPLETE = "complete"
    PRUNED = "left the race"
    FAILED = "failed"


@dataclass(frozen=True)
class Trial:
    """One trial of a search; `known` are those that any careful user would try by hand, `what` says what was tried."""

    number: int
    value: float | None
    state: TrialState = TrialState.COMPLETE
    what: str = ""
    rows: int | None = None
    known: bool = False


@dataclass(frozen=True)
class History:
    """The trials of a search in the order they ran, what was sought, and the best uniform merge's value to compare."""

    objective: str
    trials: tuple[Trial, ...]
    higher_is_better: bool = True
    percent: bool = False
    reference: float | None = None
    reference_name: str = ""


@dataclass(frozen=True)
class Importance:
    """How much each parameter of the search mattered: pairs of name and share, the shares sum to 1."""

    method: str
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class FrontPoint:
    """One contender or trial between two tasks. `best` are those that none beats on both; `label` is drawn if given."""

    name: str
    x: float | None
    y: float | None
    best: bool = False
    role: Role = Role.CANDIDATE
    label: str = ""


@dataclass(frozen=True)
class Front:
    """What two tasks cost each other, in the share of the expert's gain kept unless `percent` is False."""

    x_name: str
    y_name: str
    points: tuple[FrontPoint, ...]
    percent: bool = True
    higher_is_better: bool = True


@dataclass(frozen=True)
class Answer:
    """What one contender answered."""

    contender: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, what is expected where that is known, and the answers."""

    prompt: str
    answers: tuple[Answer, ...]
    task: str = ""
    expected: str | None = None


@dataclass(frozen=True)
class ModelRecord:
    """One model that went in: how it is named, what it is for, its revision or hash, and its license where stated."""

    name: str
    role: str
    fingerprint: str = ""
    license: str = ""


@dataclass(frozen=True)
class TextRecord:
    """One text that was read: which rows of which file or data set, what for, and the hash of the rows."""

    name: str
    source: str
    used_for: str
    rows: int | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class Run:
    """What was run. `seconds` is wall time, `memory` and `disk` are peaks in bytes, `facts` further label and value."""

    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    models: tuple[ModelRecord, ...] = ()
    texts: tuple[TextRecord, ...] = ()
    seeds: tuple[tuple[str, int], ...] = ()
    device: str = ""
    seconds: float | None = None
    memory: int | None = None
    disk: int | None = None
    created: str = ""
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """One report.

    Args:
        title: of the page.
        verdict: the sentence at its head.
        contenders: everything that was scored; candidates in the order they are to be listed, the best first.
        reference, winner: names among the contenders: what differences are taken against, and what is recommended.
        notes: what the intervals mean and other sentences a reader needs for the numbers.
        warnings: what went wrong or should be looked at.
        next_command: what to type next.

    Raises:
        ValueError: two contenders of one name, or a name that no contender has.
    """

    title: str
    verdict: Verdict | None = None
    contenders: tuple[Contender, ...] = ()
    reference: str = ""
    winner: str = ""
    tasks: tuple[TaskScores, ...] = ()
    standings: tuple[Standing, ...] = ()
    recipe: Recipe | None = None
    history: History | None = None
    importance: Importance | None = None
    fronts: tuple[Front, ...] = ()
    samples: tuple[Sample, ...] = ()
    run: Run | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    next_command: str = ""

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) != len(names):
            raise ValueError("two contenders have one name")
        scored = [score.contender for task in self.tasks for score in task.scores]
        scored += [standing.contender for standing in self.standings]
        unknown = {name for name in (*scored, self.reference, self.winner) if name} - set(names)
        if unknown:
            raise ValueError(f"no contender is named {', '.join(sorted(map(repr, unknown)))}")
