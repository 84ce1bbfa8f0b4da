"""What mergekit's merge methods do with densities: which take them, and which parameters they need to accept them.

mergekit 0.1.5 ignores a parameter that a method does not know, and della stops in the middle of a merge if a density
and its `epsilon` do not fit. Both are settled here, before anything is written. A test compares this table with the
installed mergekit's own.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError, raise_collected

_SHARED_NUMBERS = ("lambda",)


@dataclass(frozen=True)
class DeltaMethod:
    """A merge method that adds up weighted deltas, of each of which it keeps a share `density` (or all: `keeps` is "").

    `normalize` is its default: whether the sum of weighted deltas is divided by the sum of the weights. `extra` is the
    one further per-tensor parameter it has ("" for none), `extra_default` mergekit's value for it. `switches` are its
    shared parameters that are true or false.
    """

    name: str
    keeps: str
    normalize: bool
    extra: str = ""
    extra_default: float = 0.0
    switches: tuple[str, ...] = ("normalize", "int8_mask", "rescale")


DENSITY_METHODS: Mapping[str, DeltaMethod] = {
    method.name: method
    for method in (
        DeltaMethod("ties", "the largest entries", normalize=True),
        DeltaMethod("dare_ties", "random entries", normalize=False),
        DeltaMethod("dare_linear", "random entries", normalize=False),
        DeltaMethod("della", "random entries, larger ones more often", True, "epsilon", 0.15),
        DeltaMethod("della_linear", "random entries, larger ones more often", False, "epsilon", 0.15),
        DeltaMethod("breadcrumbs", "the largest entries but the very largest", False, "gamma", 0.01),
        DeltaMethod("breadcrumbs_ties", "the largest entries but the very largest", False, "gamma", 0.01),
    )
}

TASK_ARITHMETIC = DeltaMethod("task_arithmetic", "", normalize=False)

# Methods that merge with weights per layer. Without `normalize`: dividing by their sum would undo them.
WEIGHT_METHODS: Mapping[str, DeltaMethod] = {
    "task_arithmetic": TASK_ARITHMETIC,
    **{name: DENSITY_METHODS[name] for name in ("ties", "dare_ties", "dare_linear")},
}

# This project's own: the entries of largest saliency, by vectors that a file holds (`utils/merge_methods.py`).
GUIDED_TIES = DeltaMethod("guided_ties", "the entries of largest saliency", True, switches=("normalize", "vote"))

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

_DELLA_ROOM = 0.99  # della's epsilon takes at most this share of the room between a density and 0 or 1


def weight_method(name: str) -> DeltaMethod:
    """Look up `--merge_method` for guidance that gives weights.

    Raises:
        UserError: no such method, or it would not use the weights as they are meant.
    """
    if name in WEIGHT_METHODS:
        return WEIGHT_METHODS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), WEIGHT_METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(WEIGHT_METHODS)}"
    raise UserError(f"--merge_method {name!r} cannot merge with weights per layer; {hint}")


def density_method(name: str) -> DeltaMethod:
    """Look up `--merge_method` for guidance that gives densities.

    Raises:
        UserError: mergekit has no such method (the nearest is named), or it would ignore the densities.
    """
    if name in DENSITY_METHODS:
        return DENSITY_METHODS[name]
    if name in OTHER_METHODS:
        raise UserError(
            f"--merge_method {name} ignores densities ({OTHER_METHODS[name]}), so the guidance would do nothing; use "
            f"one of {', '.join(DENSITY_METHODS)}"
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), DENSITY_METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(DENSITY_METHODS)}"
    raise UserError(f"--merge_method {name!r} is unknown; {hint}")


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
    value = min(wanted, min(density, 1 - density) * _DELLA_ROOM)
    inside = density - value > 0 and density + value < 1  # not so where rounding leaves no room, next to 0 and 1
    return value if inside else 0.0


def check_global_parameters(method: DeltaMethod, parameters: Mapping[str, Any], source: str) -> None:
    """Check the pair config's `global_parameters` against what the method knows (mergekit would ignore the rest).

    Raises:
        UserError: unknown names (with the nearest known one), values of the wrong type, or names that the recipe sets
            per tensor; all of them in one message.
    """
    numbers = (*_SHARED_NUMBERS, *([method.extra] if method.extra else []))
    known = (*method.switches, *numbers)
    problems = []
    for name, value in parameters.items():
        if name in ("density", "weight"):
            problems.append(f"{name} is set per tensor by this command, a global {name} would do nothing; remove it")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
            problems.append(f"{name!r} is unknown to the merge method {method.name}; {hint}")
        elif name in method.switches and not _holds(value, _is_switch):
            problems.append(f"{name} must be true or false, got {value!r}")
        elif name in _SHARED_NUMBERS and not _holds(value, _is_number):
            problems.append(f"{name} must be a number, got {value!r}")
        elif name == method.extra and not (_is_number(value) and 0 <= value < 1):
            problems.append(f"{name} must be a number of at least 0 and below 1, got {value!r}")
    raise_collected(problems, f"{source}: global_parameters")


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _holds(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value fits, or is one of mergekit's lists: a gradient, or `{filter, value}` entries."""
    if isinstance(value, list):
        return bool(value) and all(_holds(item, fits) for item in value)
    if isinstance(value, dict):
        return "value" in value and set(value) <= {"filter", "value"} and _holds(value["value"], fits)
    return fits(value)


def normalizes(method: DeltaMethod, parameters: Mapping[str, Any]) -> bool:
    """Whether the merge divides by the sum of the weights: the config's `normalize`, else the method's default."""
    value = parameters.get("normalize", method.normalize)
    return value is True or isinstance(value, (list, dict))
