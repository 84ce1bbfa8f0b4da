"""The pair config's `global_parameters`, which one merge method has for all models: known, of its type, of its range."""

from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import Problem, raise_collected
from utils.recipes.method_rules import TASK_ARITHMETIC, DeltaMethod, is_number
from utils.suggestions import suggestion


def known_parameters(method: DeltaMethod, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The pair config's `global_parameters` without the switches of mergekit's methods that an own one does not have."""
    idle = set(TASK_ARITHMETIC.switches) - set(method.shared)
    return {name: value for name, value in parameters.items() if name not in idle}


def check_global_parameters(method: DeltaMethod, parameters: Mapping[str, Any], source: str) -> None:
    """Check the pair config's `global_parameters` against what the method knows (mergekit would ignore the rest).

    Raises:
        UserError: unknown names (with the nearest known one), values of the wrong type, or names that the recipe sets
            per tensor; all of them in one message.
    """
    known = (*method.shared, *([method.extra] if method.extra else []))
    problems = []
    for name, value in parameters.items():
        if name in ("density", "weight"):
            text = f"{name} is set per tensor by this command, a global {name} would do nothing; remove it"
            problems.append(Problem(text, "global-parameter-no-effect"))
        elif name not in known:
            hint = suggestion(name, known, f"it knows {', '.join(known)}")
            text = f"{name!r} is unknown to the merge method {method.name}; {hint}"
            problems.append(Problem(text, "global-parameter-unknown"))
        elif wanted := _wanted(method, name, value):
            problems.append(Problem(f"{name} must be {wanted}, got {value!r}", "global-parameter-value"))
    raise_collected(problems, f"{source}: global_parameters")


def _wanted(method: DeltaMethod, name: str, value: Any) -> str:
    """What a value of one of the method's parameters must be, "" if it is that."""
    numbers = {number.name: number for number in method.numbers}
    if name in method.switches:
        return "" if _holds(value, _is_switch) else "true or false"
    if name in numbers:
        return "" if _holds(value, numbers[name].allows) else numbers[name].words
    return "" if is_number(value) and 0 <= value < 1 else "a number of at least 0 and below 1"


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


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
