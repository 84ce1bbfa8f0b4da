"""What a report shows, as plain values: numbers, names and texts, with no model, table or file behind them.

Every part of a `Page` may be empty; what has no data is left out. A number that is not known is None or NaN and shown
as a dash. Names and texts may hold anything: they are escaped where they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from utils.reports.scored import Contender, Estimate, HubDataset, Outcome, Role, Score, Standing, TaskScores, is_known
from utils.reports.searched import Front, FrontPoint, History, Importance, Trial, TrialState

__all__ = [
    "Answer",
    "Contender",
    "Estimate",
    "Front",
    "FrontPoint",
    "Heatmap",
    "History",
    "HubDataset",
    "Importance",
    "ModelRecord",
    "Outcome",
    "Page",
    "Recipe",
    "Role",
    "Run",
    "Sample",
    "Score",
    "Standing",
    "TaskScores",
    "TextRecord",
    "Trial",
    "TrialState",
    "Verdict",
    "is_known",
]


@dataclass(frozen=True)
class Verdict:
    """What the page says first. `details` are further sentences; `outcome` is None where nothing was compared."""

    sentence: str
    outcome: Outcome | None = None
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heatmap:
    """One number for each layer and component, as a recipe gives them to one expert or makes of it.

    Args:
        title: whose numbers they are.
        quantity: what they are: "density", "weight", a share of its change.
        layers: labels of the rows, in the order of depth.
        components: labels of the columns.
        cells: one row per layer, one number per component; None where there is none.
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
    """The recipe that won, or that a folder was merged by: `facts` are pairs of label and value.

    `heatmaps_show` is a sentence about the heatmaps, where their quantities do not say it all.
    """

    facts: tuple[tuple[str, str], ...] = ()
    heatmaps: tuple[Heatmap, ...] = ()
    text: str = ""
    heatmaps_show: str = ""


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
