"""Flag conventions shared by all commands.

Flags are spelled with underscores, as in the reference; the dashed spelling works too. Booleans take `--x`, `--no-x`,
`--x True` and `--x False` (and False means false). A flag given twice with different values, an abbreviation and an
unknown flag are errors; unknown flags get the nearest known one.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import clipped, show_tracebacks
from utils.suggestions import nearest

TRUE_WORDS = {"true", "yes", "on", "1"}
FALSE_WORDS = {"false", "no", "off", "0"}
_SWITCHES = "A flag without a value is switched off by --no-NAME, or by NAME False."


def boolean(text: str) -> bool:
    """Read a boolean flag's value; raise `argparse.ArgumentTypeError` for anything that is not plainly one."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def path(text: str) -> Path:
    """Read a path flag: not empty, `~` expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise argparse.ArgumentTypeError(f"{text!r}: no such user's home folder; write the full path")
    return Path(expanded)


def number(low: float = -math.inf, high: float = math.inf, *, low_open: bool = False) -> Callable[[str], float]:
    """Return a flag type: a finite float within [low, high], or (low, high] with `low_open`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            hint = " (write the decimal point as '.')" if "," in text else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a number{hint}") from error
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if value < low or value > high or (low_open and value == low):
            if high == math.inf:
                raise argparse.ArgumentTypeError(f"{text} is not {'above' if low_open else 'at least'} {low:g}")
            bracket = "(" if low_open else "["
            raise argparse.ArgumentTypeError(f"{text} is outside {bracket}{low:g}, {high:g}]")
        return value

    return parse


_MOST = 2**63 - 1  # what a machine's integers hold


def whole_number(low: int, high: int = _MOST) -> Callable[[str], int]:
    """Return a flag type: an integer within [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
        if value < low and high == _MOST:
            raise argparse.ArgumentTypeError(f"{value} is not at least {low}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is outside [{low}, {high}]")
        return value

    return parse


class _StoreOnce(argparse.Action):
    """Store a value; a second, different value for the same flag (in any spelling) is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string and option_string.startswith(("--no-", "--no_")):
            if values is not None:
                parser.error(f"{option_string} takes no value")
            values = False
        elif values is None:
            values = True
        given = namespace.__dict__.setdefault("_given", {})
        if self.dest in given and given[self.dest] != values:
            parser.error(f"--{self.dest} is given twice, as '{given[self.dest]}' and as '{values}'", "flag-twice")
        given[self.dest] = values
        setattr(namespace, self.dest, values)


class _FirstSpelling(argparse.RawDescriptionHelpFormatter):
    """Help that shows the first spelling of each flag only, and no values of switches."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0 or action.type is boolean:
            return action.option_strings[0]
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` with this project's conventions. Declare flags with `flag` and `switch`.

    Every command has `--quiet` and `--traceback`. The latter takes effect by itself; `quiet` is in the parsed flags,
    for the command to hand on.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _FirstSpelling)
        super().__init__(allow_abbrev=False, add_help=False, epilog=_SWITCHES, **kwargs)
        self.elsewhere: dict[str, str] = {}  # the command that a flag belongs to, by name, where it is another one
        general = self.add_argument_group("help and output")
        general.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.switch("quiet", "no report and no progress bar; warnings and the last lines remain", group=general)
        self.switch(
            "traceback",
            "with an error message, also show where in the program it comes from and its cause",
            group=general,
        )

    def flag(self, name: str, help: str, *, group: Any = None, **kwargs: Any) -> None:
        """Declare `--name` (underscored) and its dashed alias.

        Args:
            name: underscored.
            help: what it does.
            group: the argument group under whose title the help shows it; None: "options".
            kwargs: as in `add_argument`.
        """
        default = kwargs.get("default")
        if default is not None and default != "":
            help = f"{help} [default: {str(default).replace('%', '%%')}]"
        (group or self).add_argument(*_spellings("--", name), dest=name, action=_StoreOnce, help=help, **kwargs)

    def computing_flags(self, side_by_side: str) -> None:
        """Declare where and how models are computed.

        Args:
            side_by_side: what goes side by side on several devices, a clause.
        """
        self.flag("device", "where to compute: auto, cpu, cuda or cuda:n", default="auto")
        self.flag("devices", f"several of one kind, such as cuda:0,cuda:1 or cpu,cpu: {side_by_side}")
        self.flag(
            "dtype",
            "precision of the forward pass; auto: each checkpoint's own, or float32 on a processor that is slow in that",
            choices=("auto", "float32", "bfloat16", "float16"),
            default="auto",
        )
        self.flag(
            "micro_batch_tokens",
            "tokens that go through a block together; lower it if memory is short [default: 2048 on the CPU, 16384 on a "
            "GPU]",
            type=whole_number(1, 2**24),
        )

    def ray_flags(self) -> None:
        """Declare `--ray` and what belongs to it."""
        self.flag(
            "ray",
            "do the work on a cluster of Ray: auto on one of its machines, or HOST:PORT of its head (docs/cluster.md)",
            metavar="ADDRESS",
        )
        self.flag(
            "ray_gpus",
            "GPUs that a task takes, such as 0.5 for two on one GPU, 0 for CPUs alone [default: 1 if the cluster has any]",
            type=number(0, 64),
        )
        self.flag(
            "ray_cpus", "CPUs that a task takes, and torch's threads in it [default: 1]", type=whole_number(1, 4096)
        )

    def switch(self, name: str, help: str, default: bool | None = False, *, group: Any = None) -> None:
        """Declare a boolean flag: `--name`, `--no-name`, `--name True|False`; `group` as in `flag`."""
        spellings = [*_spellings("--", name), *_spellings("--no-", name), *_spellings("--no_", name)]
        shown = "" if default is None else f" [default: {default}]"
        (group or self).add_argument(
            *dict.fromkeys(spellings),
            dest=name,
            action=_StoreOnce,
            nargs="?",
            type=boolean,
            default=default,
            help=help + shown,
        )

    def format_help(self) -> str:
        """The help; its usage line holds what must be given, the rest is listed below."""
        flags = [f"--{one.dest} {one.dest.upper()}" for one in self._actions if one.option_strings and one.required]
        words = [f"[{one.metavar} ...]" for one in self._actions if not one.option_strings]
        self.usage = " ".join(["%(prog)s", *flags, "[flags]", *words])
        return super().format_help()

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line; unknown flags end the process with the nearest known flag in the message."""
        words = sys.argv[1:] if argv is None else list(argv)
        self._refuse_unknown_flags(words)  # before argparse misses the required flag that is misspelled
        namespace, unknown = self.parse_known_args(self._switches_apart(words))
        if unknown:
            self.error(self._unknown(unknown[0]), "flag-unknown")
        namespace.__dict__.pop("_given", None)
        show_tracebacks(namespace.__dict__.pop("traceback"))
        return namespace

    def _switches_apart(self, words: Sequence[str]) -> list[str]:
        """The words with every switch spelled out before a word that is none of its own, where a command takes such."""
        if not any(not action.option_strings for action in self._actions):
            return list(words)
        switches = {
            text: action.dest for action in self._actions if action.type is boolean for text in action.option_strings
        }
        found = []
        for word, following in zip(words, [*words[1:], "--"], strict=True):
            name = switches.get(word)
            if (
                name is not None
                and not following.startswith("--")
                and following.lower() not in TRUE_WORDS | FALSE_WORDS
            ):
                word = f"--{name}={not word.startswith(('--no-', '--no_'))}"
            found.append(word)
        return found

    def knows(self, word: str) -> bool:
        """Whether a word of a command line is one of the flags, in any spelling, with a value or without."""
        return any(word.split("=")[0] in action.option_strings for action in self._actions)

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        for word in words:
            if word.startswith("--") and not self.knows(word):
                self.error(self._unknown(word), "flag-unknown")

    def _unknown(self, word: str) -> str:
        name = word.split("=")[0].removeprefix("--").removeprefix("no-").removeprefix("no_").replace("-", "_")
        if name in self.elsewhere:
            return f"unknown argument {word!r}; --{name} is a flag of {self.elsewhere[name]}"
        known = [option for action in self._actions for option in action.option_strings]
        near = nearest(word.split("=")[0], known)
        return f"unknown argument {word!r}; " + (f"did you mean {near}?" if near else "--help lists the flags")

    def error(self, message: str, code: str = "flag-invalid") -> NoReturn:
        """Print the message, the way to the help text and the mistake's code; exit code 2."""
        message = re.sub(r"(--[\w-]+)(?:/--[\w-]+)+", r"\1", message)  # one spelling of each flag is enough
        print(f"error: {clipped(message)}\n(`{self.prog} --help` explains every flag) [{code}]", file=sys.stderr)
        sys.exit(2)


def _spellings(prefix: str, name: str) -> list[str]:
    return list(dict.fromkeys([prefix + name, prefix + name.replace("_", "-")]))
