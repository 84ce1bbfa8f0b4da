"""What mergekit's merge methods do with densities: which take them, and which parameters they need to accept them.

mergekit 0.1.5 ignores a parameter that a method does not know, and della stops in the middle of a merge if a density
and its `epsilon` do not fit. Both are settled here, before anything is written. A test compares this table with the
installed mergekit's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.suggestions import as_written, suggestion


@dataclass(frozen=True)
class SharedNumber:
    """A parameter of a merge method, one for all models: a number from `low` (or above it: `low_open`) to `high`.

    `is_written` if a recipe says it even where the user does not.
    """

    name: str
    default: float
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    is_written: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a value is such a number."""
        if not is_number(value) or not math.isfinite(value):
            return False
        return self.low < value <= self.high or (value == self.low and not self.low_open)

    @property
    def words(self) -> str:
        """What values it takes, to put after "must be"."""
        if self.low == -math.inf:
            return "a number"
        low = f"above {self.low:g}" if self.low_open else f"of at least {self.low:g}"
        return f"a number {low}" + ("" if self.high == math.inf else f" and at most {self.high:g}")


LAMBDA = SharedNumber("lambda", 1.0)


@dataclass(frozen=True)
class DeltaMethod:
    """A merge method that adds up weighted deltas, of each of which it keeps a share `density` (or all: `keeps` is "").

    `normalize` is its default: whether the sum of weighted deltas is divided by the sum of the weights. `extra` is the
    one further per-tensor parameter it has ("" for none), `extra_default` mergekit's value for it. `switches` are its
    shared parameters that are true or false, `numbers` those that are numbers. `does` says what it does with what is
    kept. `whole` if it keeps all unless a mean density is asked for. `votes` if in each entry only the experts that change
    it in the direction of the majority count, `averages` if it divides by all of them. `own` if it is this project's.
    """

    name: str
    keeps: str
    normalize: bool
    extra: str = ""
    extra_default: float = 0.0
    switches: tuple[str, ...] = ("normalize", "int8_mask", "rescale")
    numbers: tuple[SharedNumber, ...] = (LAMBDA,)
    does: str = "adds whole deltas"
    whole: bool = False
    votes: bool = False
    averages: bool = False
    own: bool = False

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of its parameters that are one for all models."""
        return (*self.switches, *(number.name for number in self.numbers))


DENSITY_METHODS: Mapping[str, DeltaMethod] = {
    method.name: method
    for method in (
        DeltaMethod("ties", "the largest entries", normalize=True, votes=True),
        DeltaMethod("dare_ties", "random entries", normalize=False, votes=True),
        DeltaMethod("dare_linear", "random entries", normalize=False),
        DeltaMethod("della", "random entries, larger ones more often", True, "epsilon", 0.15, votes=True),
        DeltaMethod("della_linear", "random entries, larger ones more often", False, "epsilon", 0.15),
        DeltaMethod("breadcrumbs", "the largest entries but the very largest", False, "gamma", 0.01),
        DeltaMethod("breadcrumbs_ties", "the largest entries but the very largest", False, "gamma", 0.01, votes=True),
    )
}

TASK_ARITHMETIC = DeltaMethod("task_arithmetic", "", normalize=False)

# Methods that merge with weights per layer. Without `normalize`: dividing by their sum would undo them.
WEIGHT_METHODS: Mapping[str, DeltaMethod] = {
    "task_arithmetic": TASK_ARITHMETIC,
    **{name: DENSITY_METHODS[name] for name in ("ties", "dare_ties", "dare_linear")},
}

# This project's own, by vectors that a file holds (`utils/merging/guided/methods.py`).
GUIDED_TIES = DeltaMethod(
    "guided_ties", "the entries of largest saliency", True, switches=("normalize", "vote"), votes=True, own=True
)
GUIDED_MEAN = DeltaMethod(
    "guided_mean",
    "the entries of largest saliency",
    normalize=False,
    switches=(),
    # defaults measured by benchmarks/quality.py
    numbers=(LAMBDA, SharedNumber("power", 0.5, 0, 1, True, True), SharedNumber("floor", 0.1, 0, is_written=True)),
    does="averages the experts' deltas, each entry weighed by its squared gradient",
    whole=True,
    averages=True,
    own=True,
)
GRAM_MEAN = DeltaMethod(
    "gram_mean",
    "entries, fitted anew to answer like the whole",
    normalize=False,
    switches=("embedding_rows", "low_rank", "joint_support", "anchor"),
    numbers=(
        *GUIDED_MEAN.numbers,
        SharedNumber("ridge", 1e-5, 0, 1, low_open=True, is_written=True),
        SharedNumber("off_diagonal", 1.0, 0, 1),
        SharedNumber("refit_ridge", 1e-3, 0, low_open=True),
    ),
    does="takes the change that answers as each expert does on its own inputs",
    whole=True,
    averages=True,
    own=True,
)
OWN_METHODS: Mapping[str, DeltaMethod] = {method.name: method for method in (GUIDED_TIES, GUIDED_MEAN, GRAM_MEAN)}

# Methods of mergekit that have no use for a density, with what they do instead.
OTHER_METHODS: Mapping[str, str] = {
    "task_arithmetic": "it adds whole deltas; ties or dare_linear do the same with densities",
    "linear": "it averages whole tensors",
    "slerp": "it interpolates whole tensors",
    "nuslerp": "it interpolates whole tensors",
    "multislerp": "it interpolates whole tensors",
    "nearswap": "it interpolates by distance",
    "karcher": "it averages whole tensors on a sphere",
    "model_stock": "it sets its own weights from the geometry of the models",
    "arcee_fusion": "it chooses its own entries",
    "passthrough": "it copies tensors",
    "sce": "it selects entries by variance (select_topk)",
    "ram": "it chooses its own entries",
    "ramplus_tl": "it chooses its own entries",
}

_DELLA_MARGIN = 0.99  # della's epsilon takes at most this share of what lies between a density and 0 or 1


def weight_method(name: str) -> DeltaMethod:
    """Look up `--merge_method` for guidance that gives weights.

    Raises:
        UserError: no such method, or it would not use the weights as they are meant.
    """
    if name in WEIGHT_METHODS:
        return WEIGHT_METHODS[name]
    _refuse_own(name)
    hint = suggestion(as_written(name), WEIGHT_METHODS, f"use one of {', '.join(WEIGHT_METHODS)}")
    raise UserError(f"--merge_method {name!r} cannot merge with weights per layer; {hint}", "merge-method-unfit")


def density_method(name: str, own: Sequence[str] = ()) -> DeltaMethod:
    """Look up `--merge_method` for guidance that gives densities.

    Args:
        name: mergekit's name of a method.
        own: the names of this project's methods that would be accepted, for the message.

    Raises:
        UserError: mergekit has no such method (the nearest is named), or it would ignore the densities.
    """
    if name in DENSITY_METHODS:
        return DENSITY_METHODS[name]
    if name in OTHER_METHODS:
        raise UserError(
            f"--merge_method {name} ignores densities ({OTHER_METHODS[name]}), so the guidance would do nothing; use "
            f"one of {', '.join(DENSITY_METHODS)}",
            "merge-method-unfit",
        )
    _refuse_own(name)
    known = (*DENSITY_METHODS, *own)
    hint = suggestion(as_written(name), known, f"known: {', '.join(known)}")
    raise UserError(f"--merge_method {name!r} is unknown; {hint}", "merge-method-unknown")


def _refuse_own(name: str) -> None:
    """Refuse a method of this project's where there are no vectors for it."""
    if name == GUIDED_TIES.name:
        raise UserError(
            f"--merge_method {name} cannot be given; --guidance saliency_budget --mask saliency with ties chooses it",
            "merge-method-unfit",
        )
    if name == GRAM_MEAN.name:
        raise UserError(
            f"--merge_method {name} needs what --guidance {name} measures; choose that", "merge-method-unfit"
        )
    if name in OWN_METHODS:
        raise UserError(
            f"--merge_method {name} needs vectors that --guidance saliency_budget measures; choose that",
            "merge-method-unfit",
        )


def counterpart(method: DeltaMethod, asked: DeltaMethod) -> DeltaMethod:
    """mergekit's method that does what an own one does, without vectors; any other is its own counterpart.

    Args:
        method: the recipe's.
        asked: the method asked for on the command line, in whose place the recipe's may be.
    """
    if method.averages:  # breadcrumbs that leaves out none of the largest selects by magnitude, without a vote
        return DENSITY_METHODS["breadcrumbs"] if method.keeps else TASK_ARITHMETIC
    return asked if method.own else method


def extra_value(method: DeltaMethod, density: float, wanted: float) -> float:
    """The value of the method's extra parameter at a density: `wanted`, or as near to it as the density allows.

    della draws entries with probabilities from `density - epsilon` to `density + epsilon`, which must stay inside
    (0, 1); at density 0 and 1 it draws nothing and any epsilon is accepted. breadcrumbs leaves out the `gamma` largest
    entries, which cannot be more than the share that is dropped.
    """
    if density in (0.0, 1.0):
        return wanted
    if method.extra == "gamma":
        return min(wanted, 1 - density)
    value = min(wanted, min(density, 1 - density) * _DELLA_MARGIN)
    # next to 0 and 1 rounding leaves nothing between
    return value if density - value > 0 and density + value < 1 else 0.0


def is_number(value: Any) -> bool:
    """Whether a value from a YAML file is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
