"""The guidance that makes the start of another one: measured first, in the same go, by flags beside the other's own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from utils.errors import UserError
from utils.guidance.method import GuidanceMethod, MethodFlag, guidance_methods

START = "start"
START_FLAG = MethodFlag(
    START,
    "guidance (gram_mean) to measure by first, with its own flags beside these, and to start from the recipe that it gives at "
    "its defaults; instead of --start_recipe",
)


def starts_of(method: GuidanceMethod) -> dict[str, GuidanceMethod]:
    """The guidances that a method may start from, by name: those whose usual recipe it refines."""
    return {name: one for name, one in guidance_methods().items() if one.merge_method in method.refines}


def start_of(method: GuidanceMethod, options: Mapping[str, Any]) -> GuidanceMethod | None:
    """The guidance that makes a method's start by the values of its flags; None without one.

    Raises:
        UserError: it can make none; there is another start, too.
    """
    name = options.get(START)
    if name is None:
        return None
    known = starts_of(method)
    if name not in known:
        raise UserError(
            f"--{START} {name}: {method.name} starts from what {', '.join(known) or 'no guidance'} gives; for another start make "
            f"its recipe first and give that (--{method.file_flags[0]})",
            "start-guidance-unfit",
        )
    for flag in method.file_flags:
        if options.get(flag):
            raise UserError(
                f"--{START} {name} measures its own start, and --{flag} {options[flag]} is another one; give --guidance "
                f"{method.name} with either",
                "start-twice",
            )
    return known[name]


def with_start(method: GuidanceMethod, options: Mapping[str, Any]) -> GuidanceMethod:
    """A method as it measures with these values of its flags: with the files, flags and needs of its start, if it has one.

    Raises as `start_of`.
    """
    first = start_of(method, options)
    if first is None:
        return method
    return replace(
        method,
        tables=(*first.tables, *method.tables),
        expert_file=first.expert_file,
        measure_flags=tuple(dict.fromkeys((*first.measure_flags, *method.measure_flags))),
        fewest_experts=max(first.fewest_experts, method.fewest_experts),
        text_per_task=first.text_per_task or method.text_per_task,
        config_keys=tuple(dict.fromkeys((*first.config_keys, *method.config_keys))),
        tasks="; then ".join(one.tasks for one in (first, method) if one.tasks),
        in_float32=first.in_float32 or method.in_float32,
        models_at_once=lambda experts: max(first.models_at_once(experts), method.models_at_once(experts)),
    )
