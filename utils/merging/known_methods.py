"""The merge methods with their parameters, and whether a setting suits one; mergekit is not imported.

A test compares them with the installed mergekit's own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from utils.errors import Problem
from utils.recipes.method_rules import DENSITY_METHODS, OWN_METHODS, TASK_ARITHMETIC, DeltaMethod
from utils.suggestions import suggestion
from utils.validation import show

_SHARES = ("density", "select_topk")  # parameters that are shares of a tensor's entries


@dataclass(frozen=True)
class KnownMethod:
    """A merge method: `base` is its base model: `required`, `optional`, `ignored` or `forbidden`.

    `shared` are the types of its parameters that are one for all models, `own` of those that each model has, the base
    too if `of_base`. `cuts`: it makes use of the density that it takes.
    """

    name: str
    base: str
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    of_base: bool = False
    cuts: bool = False


def _delta_method(rules: DeltaMethod) -> KnownMethod:
    shared = dict.fromkeys(rules.switches, bool) | dict.fromkeys((number.name for number in rules.numbers), float)
    factors = ("factor",) if rules.own and rules.averages else ()
    own = dict.fromkeys(("weight", "density", *factors, *([rules.extra] if rules.extra else [])), float)
    file = {"saliency": str} if rules.name in OWN_METHODS else {}
    return KnownMethod(rules.name, "required", shared, own | file, cuts=bool(rules.keeps))


_WEIGHT = {"weight": float}
METHODS: Mapping[str, KnownMethod] = {
    method.name: method
    for method in (
        *(_delta_method(rules) for rules in (*DENSITY_METHODS.values(), TASK_ARITHMETIC, *OWN_METHODS.values())),
        KnownMethod("arcee_fusion", "required", {}, {}),
        KnownMethod("karcher", "ignored", {"max_iter": int, "tol": float}, {}),
        KnownMethod("linear", "ignored", {"normalize": bool}, _WEIGHT, of_base=True),
        KnownMethod("model_stock", "required", {"filter_wise": bool}, {}),
        KnownMethod("multislerp", "optional", {"normalize_weights": bool, "eps": float}, _WEIGHT),
        KnownMethod("nearswap", "required", {"t": float}, {}),
        KnownMethod("nuslerp", "optional", {"nuslerp_row_wise": bool, "nuslerp_flatten": bool}, _WEIGHT),
        KnownMethod("passthrough", "ignored", {}, {"scale": float | None}, of_base=True),
        KnownMethod("ram", "required", {"epsilon": float}, {}),
        KnownMethod("ramplus_tl", "required", {"r": float, "alpha": float, "epsilon": float}, {}),
        KnownMethod("sce", "required", {"int8_mask": bool, "select_topk": float}, {}),
        KnownMethod("slerp", "required", {"t": float}, {}),
    )
}


def setting_problems(method: KnownMethod, parameters: Mapping[str, Any], *, own: bool) -> Iterator[Problem]:
    """What is wrong with the parameters at one place of a recipe: those of one model if `own`, else those of all.

    A setting is a number (or text, or a truth value), a gradient, or `{filter, value}` entries. Each text follows the
    place's own key.
    """
    usable = method.own if own else method.shared | method.own
    for name, setting in parameters.items():
        if name in usable:
            yield from _faults(f".{name}", usable[name], name in _SHARES, setting)
        elif name in method.shared:
            text = f".{name} has no effect under one model; move it to the recipe's own parameters"
            yield Problem(text, "shared-parameter")
        else:
            hint = suggestion(name, usable, f"it knows {', '.join(usable) or 'none here'}", 0.5)
            yield Problem(f".{show(name)[1:-1]} is unknown to {method.name}; {hint}", "unknown-parameter")


def _faults(where: str, kind: Any, share: bool, setting: Any, inner: bool = False) -> Iterator[Problem]:
    """What is wrong with the setting of a parameter of a kind; `inner`: it is what an entry gives, or one of a list."""
    if setting is None or setting == []:
        yield Problem(f"{where} has no value; give one or remove it", "no-value")
    elif isinstance(setting, dict) and not inner:
        for key in setting:
            if key not in ("filter", "value"):
                hint = suggestion(key, ("filter", "value"), "known keys: filter, value", 0.5)
                yield Problem(f"{where}.{show(key)[1:-1]} is unknown; {hint}", "unknown-key")
        text = setting.get("filter")
        if not (text is None or isinstance(text, str)):
            yield Problem(f"{where}.filter must be text, got {show(text)}", "wrong-type")
        at = f"{where} (filter {text!r})" if isinstance(text, str) else where
        value = setting.get("value")
        listed = isinstance(value, list) and value
        for one in value if listed else [value]:
            yield from _faults(at, kind, share, one, inner=True)
    elif isinstance(setting, list) and not inner:
        entries = [isinstance(one, dict) for one in setting]
        if any(entries) and not all(entries):
            yield Problem(f"{where} must list either values or {{filter, value}} entries, not both", "wrong-type")
        for place, one in enumerate(setting):
            yield from _faults(f"{where}[{place}]", kind, share, one, inner=not entries[place])
    else:
        yield from _scalar_faults(where, kind, share, setting)


def _scalar_faults(where: str, kind: Any, share: bool, value: Any) -> Iterator[Problem]:
    try:
        if isinstance(value, (dict, list)) or (isinstance(value, bool) and kind is not bool):
            raise TypeError
        read = reader(kind).validate_python(value)
    except (ValidationError, TypeError):
        words = {bool: "true or false", int: "a whole number", str: "text"}.get(kind, "a number")
        yield Problem(f"{where} must be {words}, got {show(value)}", "wrong-type")
        return
    if isinstance(read, float) and not math.isfinite(read):
        yield Problem(f"{where}: {value!r} is not a finite number", "not-finite")
    elif share and not 0 <= read <= 1:
        yield Problem(f"{where}: {value!r} is outside [0, 1]", "out-of-range")


@lru_cache
def reader(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)
