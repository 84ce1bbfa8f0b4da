"""The key `search` of the pair config: which recipes a search may try, and within which bounds.

search:
  merge_method: [task_arithmetic, ties]      one or several of mergekit's, or of this project's
  guidance: [uniform, lines, lewis]          uniform and lines (LiNeS) need no measurement
  measurements: [output/my_pair/delta_dfs]   dataframe folders; default: those beside the search's own folder
  lambda: [0.1, 1.5]                         a range is searched, a number is fixed
  density: [0.1, 1]
  depth_groups: 3
  options: {saliency_budget: {mask: [magnitude, saliency]}}
  objective_weights: {math: 2, code: 1}
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from utils.errors import Problem
from utils.pair.source import Place
from utils.validation import Mistakes, Text, checked, refuse, show

MAX_DEPTH_GROUPS = 16
MAX_VALUES = 100  # to try of one flag


@dataclass(frozen=True)
class Span:
    """The values that a number of a recipe may take: from `low` to `high`, both included; one value where they are equal."""

    low: float
    high: float

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to search."""
        return self.low == self.high

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        return self.low <= value <= self.high


def _span(raw: Any) -> Span:
    if isinstance(raw, Span):
        return raw
    ends = raw if isinstance(raw, list) else [raw, raw]
    if len(ends) != 2 or not all(map(_is_number, ends)):
        raise Mistakes(Problem(f"must be a number or a range [low, high], got {show(raw)}", "wrong-type"))
    low, high = map(float, ends)
    if low > high:
        raise Mistakes(Problem(f"begins above its end; write [{high:g}, {low:g}]", "out-of-range"))
    return Span(low, high)


def _bounded(span: Span, high: float, *, low_open: bool) -> Span:
    """Refuse what reaches below 0 (or, with `low_open`, down to it) or above `high`."""
    if span.low < 0 or (low_open and span.low == 0) or span.high > high:
        above = "above 0" if low_open else "at least 0"
        at_most = "" if high == math.inf else f" and at most {high:g}"
        raise Mistakes(Problem(f"must be {above}{at_most}, got {span.low:g} to {span.high:g}", "out-of-range"))
    return span


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(raw: Any) -> Any:
    return raw if raw is None or isinstance(raw, (list, tuple)) else [raw]


def _few(raw: Any) -> Any:
    values = _listed(raw)
    if values is not None and len(values) > MAX_VALUES:  # every one is written down with every trial
        raise Mistakes(Problem(f"lists {len(values)} values to try; at most {MAX_VALUES} can be", "wrong-length"))
    return values


def _each_once(names: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if names is not None and not names:
        raise Mistakes(Problem("is an empty list; leave the key out for all there are", "wrong-length"))
    refuse(
        Problem(f"lists {show(name)} twice", "name-twice") for name, count in Counter(names or ()).items() if count > 1
    )
    return names


def _plain(value: Any) -> Any:
    if not isinstance(value, (str, bool)) and not _is_number(value):
        raise Mistakes(Problem(f"must be text, a finite number, true or false, got {show(value)}", "wrong-type"))
    return value


def _some_weight(weights: Mapping[str, float]) -> Mapping[str, float]:
    if weights and not sum(weights.values()) > 0:
        raise Mistakes(Problem("has no task above 0", "out-of-range"))
    return weights


Positive = Annotated[Span, BeforeValidator(_span), AfterValidator(partial(_bounded, high=math.inf, low_open=True))]
NotNegative = Annotated[Span, BeforeValidator(_span), AfterValidator(partial(_bounded, high=math.inf, low_open=False))]
Share = Annotated[Span, BeforeValidator(_span), AfterValidator(partial(_bounded, high=1, low_open=True))]
Part = Annotated[Span, BeforeValidator(_span), AfterValidator(partial(_bounded, high=1, low_open=False))]
Names = Annotated[tuple[Text, ...] | None, BeforeValidator(_listed), AfterValidator(_each_once)]
Places = Annotated[tuple[Place, ...] | None, BeforeValidator(_listed), AfterValidator(_each_once)]
Values = Annotated[
    tuple[Annotated[Any, AfterValidator(_plain)], ...], BeforeValidator(_few), AfterValidator(_each_once)
]


@checked(kw_only=True)
class SearchSettings:
    """The value of `search`, one field per key.

    `merge_method` and `guidance` are None for all that can be used. `lambda_` (`lambda`) is the factor on the merged
    delta, `density` the mean share that is kept, `gamma` and `epsilon` LEWIS's ends of it, `power` and `floor` those of
    `guided_mean`. `weights` bounds each expert's factor before they are scaled to mean 1, `depth` that of each of
    `depth_groups` groups of neighboring blocks, likewise. `options` are the values to try of a guidance method's own
    flags, by method and flag. `objective_weights` are by task.
    """

    merge_method: Names = None
    guidance: Names = None
    measurements: Places = None
    lambda_: Annotated[Positive, Field(alias="lambda")] = Span(0.1, 1.5)
    density: Share = Span(0.1, 1.0)
    gamma: Part = Span(0.0, 0.4)
    epsilon: Share = Span(0.5, 1.0)
    power: Share = Span(0.25, 1.0)
    floor: NotNegative = Span(0.0, 0.5)
    weights: Positive = Span(0.6, 1.4)
    depth: Positive = Span(0.6, 1.4)
    depth_groups: Annotated[int, Field(strict=True, ge=1, le=MAX_DEPTH_GROUPS)] = 2
    options: Mapping[Text, Mapping[Text, Values]] = field(default_factory=dict)
    objective_weights: Annotated[
        Mapping[Text, Annotated[float, Field(ge=0, allow_inf_nan=False)]], AfterValidator(_some_weight)
    ] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As plain data, for manifests and for telling spaces apart."""
        return asdict(self)
