"""What a guidance method is, and which there are: every package in `utils/guidance/` whose `method.py` defines `METHOD`.

A method has two halves. The *measure* half turns models and text into tables (command 1), the *decide* half turns the
tables into a density or a weight for each tensor (command 2). Its module is light to import: torch and pandas are
imported inside the functions that need them.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.errors import UserError
from utils.flags import FlagParser

if TYPE_CHECKING:
    from utils.guidance.decide_job import DecideJob, Decision
    from utils.guidance.measure_job import MeasureJob
    from utils.pair.config import PairConfig

DEFAULT = "lewis"
Half = Literal["measure", "decide"]


@dataclass(frozen=True)
class MethodFlag:
    """A flag that belongs to one method. `default` is what holds if it is not given; `switch` makes it a boolean."""

    name: str
    help: str
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    default: Any = None
    switch: bool = False


@dataclass(frozen=True)
class Measured:
    """What a *measure* half returns: the content of its files by name, what to print, and what to warn of.

    A file too large for memory is a path in the job's `workspace`.
    """

    files: Mapping[str, bytes | Path]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuidanceMethod:
    """One way to guide a merge.

    `gives` says what its *decide* half sets per tensor. `fewest_experts` are needed; with `text_per_task` each expert
    should be measured on text of its own. `config_keys` are the keys of the pair config that this method uses and others
    do not. `own_merge_methods` are this project's merge methods (`utils/recipes/method_rules.py`) that `--merge_method` may name
    beside mergekit's. `files` names what the *measure* half writes, the manifest aside; `choices` are lines that say how.
    """

    name: str
    summary: str
    gives: Literal["densities", "weights"]
    merge_method: str
    files: "Callable[[PairConfig], tuple[str, ...]]"
    choices: "Callable[[MeasureJob], Sequence[str]]"
    measure: "Callable[[MeasureJob], Measured]"
    decide: "Callable[[DecideJob], Decision]"
    measure_flags: tuple[MethodFlag, ...] = ()
    decide_flags: tuple[MethodFlag, ...] = ()
    fewest_experts: int = 1
    text_per_task: bool = False
    config_keys: tuple[str, ...] = ()
    own_merge_methods: tuple[str, ...] = ()

    def flags(self, half: Half) -> tuple[MethodFlag, ...]:
        """The flags of one half."""
        return self.measure_flags if half == "measure" else self.decide_flags

    def check_experts(self, config: "PairConfig", count: int) -> None:
        """Raise a `UserError` if the method needs more experts."""
        if count < self.fewest_experts:
            raise UserError(
                f"--guidance {self.name} weighs experts against each other and needs at least {self.fewest_experts}; "
                f"pair config {config.path} has {count} to merge"
            )


@cache
def guidance_methods() -> dict[str, GuidanceMethod]:
    """Every method by name, the default first."""
    from utils import guidance

    found = {}
    for entry in pkgutil.iter_modules(guidance.__path__):
        if entry.ispkg:
            method = importlib.import_module(f"{guidance.__name__}.{entry.name}.method").METHOD
            found[method.name] = method
    return {DEFAULT: found.pop(DEFAULT), **found}


def declare_flags(parser: FlagParser, half: Half) -> None:
    """Declare `--guidance` and every method's own flags."""
    methods = guidance_methods()
    listed = "; ".join(f"{method.name}: {method.summary}" for method in methods.values())
    parser.flag(
        "guidance",
        f"how to guide the merge; {listed} [default: the pair config's guidance, else {DEFAULT}]",
        choices=tuple(methods),
    )
    for method in methods.values():
        for flag in method.flags(half):
            shown = "" if flag.default is None else f" [default: {flag.default}]"
            text = f"{method.name}: {flag.help}{shown}".replace("%", "%%")
            if flag.switch:
                parser.switch(flag.name, text, default=None)
            else:
                more = {key: value for key in ("type", "choices") if (value := getattr(flag, key)) is not None}
                parser.flag(flag.name, text, **more)


def chosen_method(asked: str | None, config: "PairConfig") -> GuidanceMethod:
    """The method of `--guidance`, else the pair config's, else the default.

    Raises:
        UserError: the pair config names a method that does not exist.
    """
    methods = guidance_methods()
    name = asked or config.guidance or DEFAULT
    if name not in methods:
        import difflib

        near = difflib.get_close_matches(name, methods, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(methods)}"
        raise UserError(f"pair config {config.path}: guidance {name!r} is unknown; {hint}")
    return methods[name]


def own_options(method: GuidanceMethod, half: Half, given: argparse.Namespace) -> dict[str, Any]:
    """The values of a method's own flags, defaults filled in.

    Raises:
        UserError: a flag of another method was given, which would do nothing.
    """
    own = {flag.name: flag.default for flag in method.flags(half)}
    for other in guidance_methods().values():
        for flag in other.flags(half):
            value = getattr(given, flag.name)
            if value is None:
                continue
            if flag.name not in own:
                raise UserError(f"--{flag.name} belongs to --guidance {other.name}; it does nothing for {method.name}")
            own[flag.name] = value
    return own
