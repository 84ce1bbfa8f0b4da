"""The recipes a search may try: ways to merge, and the numbers of each way within their bounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.pair.search import SearchSettings, Span
from utils.searching.points import LAMBDA, Point, Way
from utils.searching.ways import GUIDANCE_ENDS

if TYPE_CHECKING:
    import optuna

METHOD = "method"  # the parameter that chooses the way


@dataclass(frozen=True)
class Space:
    """All ways and bounds of one search. `experts` are the types of those that are merged, `blocks` how many there are."""

    settings: SearchSettings
    ways: tuple[Way, ...]
    experts: tuple[str, ...]
    blocks: int

    def way(self, point: Point) -> Way | None:
        """The way a point takes, None if it is none of this space's."""
        return next(
            (way for way in self.ways if (way.merge_method, way.guidance) == (point.merge_method, point.guidance)), None
        )

    def span(self, name: str) -> Span:
        """The bounds of a number."""
        return self.settings.lambda_ if name == LAMBDA else getattr(self.settings, name)

    @property
    def weighed(self) -> tuple[str, ...]:
        """The experts that have a factor to search."""
        return self.experts if len(self.experts) > 1 and not self.settings.weights.fixed else ()

    @property
    def depth_groups(self) -> int:
        """How many groups of blocks have a factor to search; 0 for none."""
        groups = min(self.settings.depth_groups, self.blocks)
        return groups if groups > 1 and not self.settings.depth.fixed else 0

    def plain(self) -> dict[str, Any]:
        """As plain data: what makes it another space."""
        return {
            "settings": self.settings.plain(),
            "ways": [
                [way.merge_method, way.guidance, {k: list(v) for k, v in way.choices.items()}] for way in self.ways
            ],
            "experts": list(self.experts),
            "depth_groups": self.depth_groups,
        }

    def continuous(self) -> bool:
        """Whether only numbers are searched, and few of them: what a Gaussian process is good at."""
        if len(self.ways) > 1 or any(len(values) > 1 for values in self.ways[0].choices.values()):
            return False
        free = sum(not self.span(name).fixed for name in self.ways[0].numbers)
        return free + len(self.weighed) + self.depth_groups <= 8

    def suggest(self, trial: "optuna.Trial") -> Point:
        """Have a trial's sampler choose a point."""
        keys = [way.key for way in self.ways]
        way = self.ways[keys.index(trial.suggest_categorical(METHOD, keys))]
        numbers = {name: _number(trial, name, self.span(name)) for name in way.numbers}
        options = {
            flag: trial.suggest_categorical(f"{way.guidance}.{flag}", list(values)) if len(values) > 1 else values[0]
            for flag, values in way.choices.items()
        }
        weights = [_number(trial, f"weight.{expert}", self.settings.weights) for expert in self.weighed]
        depth = [_number(trial, f"depth.{group + 1}", self.settings.depth) for group in range(self.depth_groups)]
        return Point(
            way.merge_method,
            way.guidance,
            _in_order(numbers),
            options,
            dict(zip(self.weighed, _mean_one(weights), strict=True)),
            tuple(_mean_one(depth)),
        )

    def parameters(self, point: Point) -> dict[str, Any] | None:
        """What a trial's parameters have to be for `suggest` to return this point; None where the space does not hold it."""
        way = self.way(point)
        if way is None or set(point.numbers) != set(way.numbers):
            return None
        found: dict[str, Any] = {METHOD: way.key}
        for name, value in point.numbers.items():
            if value is None or not self.span(name).holds(value):
                return None
            if not self.span(name).fixed:
                found[name] = value
        for flag, values in way.choices.items():
            if point.options.get(flag) not in values:
                return None
            if len(values) > 1:
                found[f"{way.guidance}.{flag}"] = point.options[flag]
        for expert in self.weighed:
            found[f"weight.{expert}"] = point.weights.get(expert, 1.0)
        depth = point.depth or (1.0,) * self.depth_groups
        found |= {f"depth.{group + 1}": value for group, value in enumerate(depth)}
        inside = [self.settings.weights.holds(point.weights.get(expert, 1.0)) for expert in self.weighed]
        inside += [self.settings.depth.holds(value) for value in depth if self.depth_groups]
        return found if all(inside) and len(depth) == self.depth_groups else None


def _number(trial: "optuna.Trial", name: str, span: Span) -> float:
    return span.low if span.fixed else trial.suggest_float(name, span.low, span.high)


def _mean_one(values: Sequence[float]) -> list[float]:
    """The values, scaled to mean 1: the factor they have in common is lambda's."""
    mean = sum(values) / len(values) if values else 1.0
    return [value / mean for value in values]


def _in_order(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers; the two ends of a share swapped where the bounds let them cross."""
    if not set(GUIDANCE_ENDS) <= set(numbers):
        return dict(numbers)
    ends = sorted(numbers[name] for name in GUIDANCE_ENDS)
    return {**numbers, **dict(zip(GUIDANCE_ENDS, ends, strict=True))}
