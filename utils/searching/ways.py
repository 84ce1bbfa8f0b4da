"""Which ways of merging a search may try: the config's `search`, checked against the methods that there are."""

from collections.abc import Mapping, Sequence

from utils.errors import UserError
from utils.guidance.chosen import BEST
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.pair.search import SearchSettings
from utils.recipes.method_rules import (
    DENSITY_METHODS,
    OTHER_METHODS,
    OWN_METHODS,
    TASK_ARITHMETIC,
    WEIGHT_METHODS,
    DeltaMethod,
)
from utils.searching.points import DENSITY, LAMBDA, LINES, UNGUIDED, UNIFORM, Way

GUIDANCE_ENDS = ("gamma", "epsilon")  # flags of guidance that says the share to keep by its two ends
_USUAL_METHODS = (TASK_ARITHMETIC.name, "ties")


def ways_to_try(settings: SearchSettings, measured: Sequence[str]) -> tuple[Way, ...]:
    """The ways that a pair's search may take.

    Args:
        settings: the pair config's `search`.
        measured: the guidance methods with a measurement to use, by name.

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
    return ways


def _check_guidance(guidance: Sequence[str], measured: Sequence[str], methods: Mapping[str, GuidanceMethod]) -> None:
    for name in guidance:
        if name in UNGUIDED or name in measured:
            continue
        if name not in methods:
            known = ", ".join((*UNGUIDED, *methods))
            which = ", of which --guidance best takes one: name that one" if name == BEST else ""
            raise UserError(
                f"search.guidance: {name!r} is unknown; there are {known}{which}", "search-unknown-guidance"
            )
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
            if key in GUIDANCE_ENDS:
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
    ends = tuple(name for name in GUIDANCE_ENDS if name in flags)
    share: tuple[str, ...] = ()
    if rule.keeps and not rule.whole:
        share = ends or (DENSITY,)
    own = tuple(one.name for one in rule.numbers if one.name != LAMBDA and hasattr(settings, one.name))
    return (LAMBDA, *share, *own)
