"""The guidance that a command's flags and the pair config ask for, with the values of its own flags.

`best` is no method: it stands for what leads in this project's benchmarks for so many experts (benchmarks/quality.py).
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from utils.errors import UserError
from utils.flags import FlagParser
from utils.guidance.method import DEFAULT, GuidanceMethod, Half, MethodFlag, guidance_methods
from utils.guidance.start import START, starts_of, with_start
from utils.pair.config import PairConfig
from utils.suggestions import suggestion

BEST = "best"
_ALONE = "gram_mean"  # leads for one expert, cut to its `density_alone`, and as the start
_SEVERAL = "tuned"  # leads for several experts, from there
_LEADING = {"rounds": 2}  # values of the start's flags that lead where experts are merged with each other
_TUNED_FROM = (
    32  # samples of each task: with 15 tuning lost 5 points on one seed of two (benchmarks/calibration_text.py)
)
_OTHER_HALF: Mapping[Half, tuple[Half, str]] = {
    "measure": ("decide", "lewis_merge.py (command 2)"),
    "decide": ("measure", "lewis_importance.py (command 1)"),
}


@dataclass(frozen=True)
class Chosen:
    """A method with the values of its own flags of one command.

    `said` is a line that says what `best` is here, "" where something else was asked for; `mean_density` is the share to keep
    that goes with it, where no flag says another. `apart` gives what `best` is where experts turn out to have other numbers of
    tokens than the base, if that is something else, and raises a `UserError` as `own_options`.
    """

    method: GuidanceMethod
    options: Mapping[str, Any]
    said: str = ""
    mean_density: float | None = None
    apart: "Callable[[], Chosen] | None" = None


def declare_flags(parser: FlagParser, half: Half) -> None:
    """Declare `--guidance` and every method's own flags."""
    methods = guidance_methods()
    listed = "; ".join(f"{method.name}: {method.summary}" for method in methods.values())
    parser.flag(
        "guidance",
        f"how to guide the merge; {listed}; {BEST}: what leads in this project's benchmark, now of several experts "
        f"{_SEVERAL} from {_ALONE} ({_flags(_LEADING)}; not tuned below nsamples {_TUNED_FROM}), of one {_ALONE} cut to --mean_density "
        f"{methods[_ALONE].density_alone} [default: the pair config's guidance, else {DEFAULT}]",
        choices=(*methods, BEST),
    )
    owners: dict[str, list[str]] = {}
    flags: dict[str, MethodFlag] = {}
    for method in methods.values():
        for flag in method.flags(half):
            assert flags.setdefault(flag.name, flag) is flag, f"two flags are called {flag.name}"
            owners.setdefault(flag.name, []).append(method.name)
    other, command = _OTHER_HALF[half]
    parser.elsewhere |= {flag.name: command for method in methods.values() for flag in method.flags(other)}
    group = parser.add_argument_group("flags of single guidance methods")
    for name, flag in flags.items():
        shown = "" if flag.default is None else f" [default: {flag.default}]"
        text = f"{', '.join(owners[name])}: {flag.help}{shown}".replace("%", "%%")
        if flag.switch:
            parser.switch(name, text, default=None, group=group)
        else:
            more = {key: value for key in ("type", "choices") if (value := getattr(flag, key)) is not None}
            parser.flag(name, text, group=group, **more)


def chosen_to_measure(given: argparse.Namespace, config: PairConfig) -> Chosen:
    """What command 1 was asked for.

    Raises:
        UserError: as `named_method` and `own_options`.
    """
    if (chosen := _named_or_alone(given, config, "measure")) is not None:
        return chosen
    methods = guidance_methods()
    method, start = methods[_SEVERAL], methods[_ALONE]
    apart = partial(_apart, start, given)
    if config.nsamples < _TUNED_FROM and not _is_asked(method, start, given):
        options = own_options(start, "measure", given, _LEADING)
        said = (
            f"{BEST}: {start.name} ({_leading(options)}), not tuned: that needs {_TUNED_FROM} samples of each task and nsamples "
            f"is {config.nsamples}; raise it, or give a flag of {method.name}"
        )
        return Chosen(start, options, said, apart=apart)
    options = own_options(method, "measure", given, {START: start.name, **_LEADING})
    return Chosen(
        method, options, f"{BEST}: {method.name} from what {start.name} gives ({_leading(options)})", apart=apart
    )


def chosen_to_decide(given: argparse.Namespace, config: PairConfig, measured: str | None) -> Chosen:
    """What command 2 was asked for, of a folder that `measured` filled (None: it does not say); raises the same.

    `best` of several experts is what was measured by `best`, which may be that of an earlier version.
    """
    if (chosen := _named_or_alone(given, config, "decide")) is not None:
        return chosen
    methods = guidance_methods()
    method = methods[measured if measured in starts_of(methods[_SEVERAL]) else _SEVERAL]
    return Chosen(method, own_options(method, "decide", given), f"{BEST}: {method.name}, as it was measured")


def _named_or_alone(given: argparse.Namespace, config: PairConfig, half: Half) -> Chosen | None:
    """What was asked for by name, or `best` of one expert; None for `best` of several. Raises as `chosen_to_measure`."""
    if (given.guidance or config.guidance) != BEST:
        method = named_method(given.guidance, config)
        return Chosen(method, own_options(method, half, given))
    if len(config.target_model_names) > 1:
        return None
    method = guidance_methods()[_ALONE]
    said = f"{BEST}: {method.name}, cut to --mean_density {method.density_alone}, since one expert is merged"
    return Chosen(method, own_options(method, half, given), said, method.density_alone)


def _is_asked(method: GuidanceMethod, start: GuidanceMethod, given: argparse.Namespace) -> bool:
    """Whether a flag of a method is given that its start does not have."""
    own = {flag.name for flag in method.flags("measure")} - {flag.name for flag in start.flags("measure")}
    return any(getattr(given, name) is not None for name in own)


def _apart(method: GuidanceMethod, given: argparse.Namespace) -> Chosen:
    said = (
        f"{BEST}: {method.name} in one round, since experts have other numbers of tokens than the base: neither a second round "
        f"nor {_SEVERAL} can be measured of them"
    )
    return Chosen(method, own_options(method, "measure", given), said)


def named_method(asked: str | None, config: PairConfig) -> GuidanceMethod:
    """The method that was asked for by name, else the pair config's, else the default.

    Raises:
        UserError: the pair config names a method that does not exist.
    """
    methods = guidance_methods()
    name = asked or config.guidance or DEFAULT
    if name not in methods:
        known = (*methods, BEST)
        hint = suggestion(name, known, f"known: {', '.join(known)}")
        raise UserError(f"pair config {config.path}: guidance {name!r} is unknown; {hint}", "config-unknown-guidance")
    return methods[name]


def default_options(method: GuidanceMethod, half: Half, experts: int) -> dict[str, Any]:
    """The defaults of a method's own flags, for so many experts that are merged with each other: those that lead, of what
    `best` starts from."""
    own = {flag.name: flag.default for flag in method.flags(half)}
    leading = _LEADING if experts > 1 and method.name == _ALONE else {}
    return own | {name: value for name, value in leading.items() if name in own}


def own_options(
    method: GuidanceMethod,
    half: Half,
    given: argparse.Namespace,
    leading: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values of a method's own flags, and of those of its start; where they are not given `leading`, else their defaults.

    Raises:
        UserError: a flag of another method was given, which would do nothing; as `start_of`.
    """
    of_half = {flag.name for flag in method.flags(half)}
    start = {name: getattr(given, name) or leading.get(name) for name in (START, *method.file_flags) if name in of_half}
    whole = with_start(method, start)
    own = {flag.name: flag.default for flag in whole.flags(half)} | leading
    for other in guidance_methods().values():
        for flag in other.flags(half):
            value = getattr(given, flag.name)
            if value is None:
                continue
            if flag.name not in own:
                hint = f"; with --{START} {other.name} it would" if other.name in starts_of(method) else ""
                raise UserError(
                    f"--{flag.name} belongs to --guidance {other.name}; it does nothing for {method.name}{hint}",
                    "flag-no-effect",
                )
            own[flag.name] = value
    return own


def _leading(options: Mapping[str, Any]) -> str:
    return _flags({name: options[name] for name in _LEADING})


def _flags(values: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name} {value}" for name, value in values.items())
