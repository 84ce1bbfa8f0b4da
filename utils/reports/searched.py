"""What a search did: its trials, what mattered, and what two tasks cost each other."""

from dataclasses import dataclass
from enum import StrEnum

from utils.reports.scored import Role, is_known


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
    """One contender or trial between two tasks. `chosen` are ringed, as what is recommended; `label` is drawn if given."""

    name: str
    x: float | None
    y: float | None
    chosen: bool = False
    role: Role = Role.CANDIDATE
    label: str = ""


@dataclass(frozen=True)
class Front:
    """What two tasks cost each other.

    Args:
        x_name, y_name: the tasks.
        points: everything that has a value on both.
        percent: the values are shares of the experts' gain; False for figures of another kind.
        higher_is_better: False for losses.
    """

    x_name: str
    y_name: str
    points: tuple[FrontPoint, ...]
    percent: bool = True
    higher_is_better: bool = True

    @property
    def unbeaten(self) -> tuple[FrontPoint, ...]:
        """The points that no other is at least as good as on both tasks and better on one, by their value on the first.

        Of points that are equal on both, all or none are among them.
        """
        sign = 1.0 if self.higher_is_better else -1.0
        known = [point for point in self.points if is_known(point.x) and is_known(point.y)]
        places = [(sign * point.x, sign * point.y) for point in known]
        found = [
            point
            for point, (x, y) in zip(known, places, strict=True)
            if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in places)
        ]
        return tuple(sorted(found, key=lambda point: point.x))
