"""The recipes a search may try: ways to merge, and the numbers of each way within their bounds.

A *way* is a merge method with what guides it: a guidance method that has measured the pair, `uniform` (the same for all
tensors) or `lines` (LiNeS: weights that grow with depth). A *point* is one way with all its numbers set; it says all that
`utils/searching/recipes.py` needs to make the recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.pair.search import SearchSettings, Span
from utils.recipes.method_rules import (
    DENSITY_METHODS,
    OTHER_METHODS,
    OWN_METHODS,
    TASK_ARITHMETIC,
    WEIGHT_METHODS,
    DeltaMethod,
)

if TYPE_CHECKING:
    import optuna

UNIFORM, LINES = "uniform", "lines"
UNGUIDED = (UNIFORM, LINES)
LAMBDA, DENSITY = "lambda", "density"
METHOD = "method"  # the parameter that chooses the way
_USUAL_METHODS = (TASK_ARITHMETIC.name, "ties")
_GUIDANCE_ENDS = ("gamma", "epsilon")  # flags of guidance that says the share to keep by its two ends


@dataclass(frozen=True)
class Way:
    """A merge method and what guides it. `numbers` are what it has to set, by name; `choices` its guidance's options."""

    merge_method: str
    guidance: str
    numbers: tuple[str, ...]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the way is called wherever people look."""
        return f"{self.merge_method}, {self.guidance}"

    @property
    def guided(self) -> bool:
        """Whether a measurement guides it."""
        return self.guidance not in UNGUIDED


@dataclass(frozen=True)
class Point:
    """A way with its numbers set.

    `numbers` are by name (None: what the guidance itself would take), `options` the guidance's own flags by name,
    `weights` each expert's factor by type (empty: 1 for all), `depth` that of each group of neighboring blocks (empty: 1).
    """

    merge_method: str
    guidance: str
    numbers: Mapping[str, float | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    depth: tuple[float, ...] = ()

    @property
    def uniform(self) -> bool:
        """Whether it merges all tensors of all experts alike: what a careful user writes by hand."""
        return self.guidance == UNIFORM and not self.weights and not self.depth

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "merge_method": self.merge_method,
            "guidance": self.guidance,
            "numbers": dict(self.numbers),
            "options": dict(self.options),
            "weights": dict(self.weights),
            "depth": list(self.depth),
        }

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "Point":
        """The point of plain data."""
        return cls(**{**data, "depth": tuple(data["depth"])})

    def sentence(self) -> str:
        """What it is, in one line."""
        numbers = [f"{name} {value:.4g}" for name, value in self.numbers.items() if value is not None]
        options = [f"{name} {value}" for name, value in self.options.items()]
        weights = [f"{expert} x{value:.3g}" for expert, value in self.weights.items()]
        depth = [f"depth {' '.join(f'x{value:.3g}' for value in self.depth)}"] if self.depth else []
        return "; ".join([f"{self.merge_method}, {self.guidance}", *numbers, *options, *weights, *depth])


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
        labels = [way.label for way in self.ways]
        way = self.ways[labels.index(trial.suggest_categorical(METHOD, labels))]
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
        found: dict[str, Any] = {METHOD: way.label}
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


def search_space(settings: SearchSettings, measured: Sequence[str], experts: Sequence[str], blocks: int) -> Space:
    """The space of a pair.

    Args:
        settings: the pair config's `search`.
        measured: the guidance methods with a measurement to use, by name.
        experts: the types of the experts to merge.
        blocks: how many decoder blocks the models have.

    Raises:
        UserError: an unknown guidance or merge method, guidance without a measurement, options that no method has, no
            way left.
    """
    methods = guidance_methods()
    guidance = settings.guidance or (
        *UNGUIDED,
        *(name for name in methods if name in measured and methods[name].searched),
    )
    _check_guidance(guidance, measured, methods)
    _check_options(settings, methods)
    ways = tuple(way for name in guidance for way in _ways(name, settings, methods))
    if not ways:
        raise UserError(
            f"search: none of merge_method {', '.join(settings.merge_method or ())} can be used with guidance "
            f"{', '.join(guidance)}; name others, or leave out either",
            "search-nothing-to-try",
        )
    return Space(settings, ways, tuple(experts), blocks)


def _number(trial: "optuna.Trial", name: str, span: Span) -> float:
    return span.low if span.fixed else trial.suggest_float(name, span.low, span.high)


def _mean_one(values: Sequence[float]) -> list[float]:
    """The values, scaled to mean 1: the factor they have in common is lambda's."""
    mean = sum(values) / len(values) if values else 1.0
    return [value / mean for value in values]


def _in_order(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers; the two ends of a share swapped where the bounds let them cross."""
    if not set(_GUIDANCE_ENDS) <= set(numbers):
        return dict(numbers)
    ends = sorted(numbers[name] for name in _GUIDANCE_ENDS)
    return {**numbers, **dict(zip(_GUIDANCE_ENDS, ends, strict=True))}


def _check_guidance(guidance: Sequence[str], measured: Sequence[str], methods: Mapping[str, GuidanceMethod]) -> None:
    for name in guidance:
        if name in UNGUIDED or name in measured:
            continue
        if name not in methods:
            known = ", ".join((*UNGUIDED, *methods))
            raise UserError(f"search.guidance: {name!r} is unknown; there are {known}", "search-unknown-guidance")
        raise UserError(
            f"search.guidance: {name} has not measured this pair; give --measure, or run lewis_importance.py --guidance "
            f"{name} and name its folder in search.measurements",
            "search-not-measured",
        )


def _check_options(settings: SearchSettings, methods: Mapping[str, GuidanceMethod]) -> None:
    for name, own in settings.options.items():
        if name not in methods:
            raise UserError(
                f"search.options: no guidance method is named {name!r}; there are {', '.join(methods)}",
                "search-unknown-guidance",
            )
        flags = {flag.name: flag for flag in methods[name].decide_flags}
        for key, values in own.items():
            if key not in flags:
                raise UserError(
                    f"search.options.{name}: no option {key!r}; it has {', '.join(flags)}", "search-unknown-option"
                )
            if key in _GUIDANCE_ENDS:
                raise UserError(
                    f"search.options.{name}.{key}: write it as search.{key}, which is a range", "search-unknown-option"
                )
            allowed = flags[key].choices
            wrong = [value for value in values if allowed is not None and value not in allowed]
            if wrong:
                raise UserError(
                    f"search.options.{name}.{key}: {wrong[0]!r} is none of {', '.join(allowed or ())}",
                    "search-unknown-option",
                )


def _ways(guidance: str, settings: SearchSettings, methods: Mapping[str, GuidanceMethod]) -> list[Way]:
    """The ways of one guidance, in the order of the merge methods asked for."""
    asked = settings.merge_method
    for name in asked or ():
        if name not in DENSITY_METHODS and name not in WEIGHT_METHODS and name not in OWN_METHODS:
            known = ", ".join((*WEIGHT_METHODS, *DENSITY_METHODS, *OWN_METHODS))
            why = f" ({OTHER_METHODS[name]})" if name in OTHER_METHODS else ""
            raise UserError(
                f"search.merge_method: {name!r}{why} cannot be searched; there are {known}",
                "search-unknown-merge-method",
            )
    if guidance == LINES:
        return (
            [Way(TASK_ARITHMETIC.name, LINES, (LAMBDA,))] if TASK_ARITHMETIC.name in (asked or _USUAL_METHODS) else []
        )
    if guidance == UNIFORM:
        rules = {**DENSITY_METHODS, **WEIGHT_METHODS}
        return [
            Way(name, UNIFORM, (LAMBDA, *([DENSITY] if rules[name].keeps else [])))
            for name in asked or _USUAL_METHODS
            if name in rules
        ]
    method = methods[guidance]
    usable = DENSITY_METHODS if method.gives == "densities" else WEIGHT_METHODS
    if method.merge_method in method.own_merge_methods:  # what it measures serves its own merge methods alone
        usable = {}
    own = {name: OWN_METHODS[name] for name in method.own_merge_methods}
    names = asked or dict.fromkeys((*_USUAL_METHODS, method.merge_method, *own))
    return [
        Way(name, guidance, _numbers(method, rule, settings), settings.options.get(guidance, {}))
        for name in names
        if (rule := own.get(name) or usable.get(name)) is not None
    ]


def _numbers(method: GuidanceMethod, rule: DeltaMethod, settings: SearchSettings) -> tuple[str, ...]:
    """What a guided way has to set: lambda; the share to keep, or its two ends; the method's own numbers."""
    flags = {flag.name for flag in method.decide_flags}
    ends = tuple(name for name in _GUIDANCE_ENDS if name in flags)
    share: tuple[str, ...] = ()
    if rule.keeps and not rule.whole:
        share = ends or (DENSITY,)
    own = tuple(one.name for one in rule.numbers if one.name != LAMBDA and hasattr(settings, one.name))
    return (LAMBDA, *share, *own)
