"""The one exception a user sees, and how a command ends because of it.

A mistake in a config, a flag, a file or a folder raises `UserError`; `run_command` prints its message and its code on
stderr and ends the process with exit code 2, without a traceback unless `--traceback` asks for one. Anything else that
goes wrong is a defect of this project and keeps its traceback.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

from utils.signals import is_finished, unwind_on_signals
from utils.trial import allow_trials

EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128  # and the signal's number: 130 Ctrl-C, 143 termination, 129 hang-up
_MOST_PROBLEMS = 30
_LONGEST_MESSAGE = 2048  # characters
_NOTHING_LEFT = "nothing unfinished was left behind"


class UserError(Exception):
    """Something the user can mend.

    The message names the key or file, the value and the remedy. `code` is a short stable name of the kind of mistake
    (`config-unknown-key`), for scripts and tests to match; `codes` has several where several problems were collected.
    """

    def __init__(self, message: str, code: str = "", *, codes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.codes = codes or (code,)

    @property
    def code(self) -> str:
        """The code of the mistake, `several` where problems of several kinds were collected."""
        return self.codes[0] if len(set(self.codes)) == 1 else "several"


class Problem(NamedTuple):
    """One of several mistakes that are reported together."""

    text: str
    code: str


def brief(error: BaseException, limit: int = 240) -> str:
    """What another library's exception says, on one line of at most `limit` characters; its type if it says nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= limit else words[: limit - 3] + "..."


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr, each once."""
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)


def raise_collected(problems: Iterable[Problem], heading: str) -> None:
    """Raise one `UserError` that lists every problem found, or return if there is none."""
    if found := list(problems):
        raise collected(found, heading)


def collected(problems: Iterable[Problem], heading: str) -> UserError:
    """One error that lists several problems, of which there is at least one; the same one twice counts once."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        return UserError(f"{heading}: {found[0].text}", found[0].code)
    lines = "\n".join(f"  - {problem.text}" for problem in found[:_MOST_PROBLEMS])
    if len(found) > _MOST_PROBLEMS:
        lines += f"\n  - and {len(found) - _MOST_PROBLEMS} more"
    message = f"{heading}: {len(found)} problems\n{lines}"
    return UserError(message, codes=tuple(dict.fromkeys(problem.code for problem in found)))


_tracebacks_shown = False


def show_tracebacks(shown: bool) -> None:
    """Whether `run_command` prints the traceback of a `UserError`, its causes included, above the message."""
    global _tracebacks_shown
    _tracebacks_shown = shown


def run_command(main: Callable[[], None], *, one_result: bool = False) -> None:
    """Run a command's `main` and end the process the way every command of this project ends.

    `one_result`: this process is for one command, which has succeeded with the one result that it publishes.

    Exit codes: 0 done; 2 a `UserError`, a package that is not installed, or an operating-system error such as a full
    disk; 130 Ctrl-C, 143 termination, 129 hang-up, but 0 once the result is published; a closed stdout (`| head`) ends
    quietly with 2. What an exception has as `kept` (`utils/publishing/kept.py`) is said in every case.
    """
    unwind_on_signals(one_result=one_result)
    if one_result:
        allow_trials()
    _tame_streams()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        kept = _kept(error)
        _end(error, f"{error}{'. ' if kept else ''}{kept[:1].upper()}{kept[1:]}", error.code)
    except KeyboardInterrupt as interrupt:
        if is_finished():
            return
        print(f"interrupted; {_kept(interrupt) or _NOTHING_LEFT}", file=sys.stderr)
        sys.exit(EXIT_SIGNAL + getattr(interrupt, "signum", signal.SIGINT))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "utils"):
            _say_kept(error)
            raise
        _end(error, f"{error}; install the requirements: pip install -r requirements.txt", "package-missing")
    except BrokenPipeError as error:
        _drop_unwritable_output()
        _say_kept(error)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        _drop_unwritable_output()
        where = f" ({error.filename})" if error.filename else ""
        _end(error, f"{error.strerror or error}{where}; {_kept(error) or _NOTHING_LEFT}", "os-error")
    except Exception as error:  # a defect of this project, with its traceback
        _say_kept(error)
        raise


def _kept(error: BaseException) -> str:
    """What an exception says of the work that stays, "" if none does."""
    return str(getattr(error, "kept", ""))


def _say_kept(error: BaseException) -> None:
    if kept := _kept(error):
        print(kept, file=sys.stderr)


def clipped(message: str, most: int = _LONGEST_MESSAGE) -> str:
    """A message of at most about `most` characters: of a longer one the middle is left out, in whole lines where it can be."""
    if len(message) <= most:
        return message
    first, last = message[: most * 2 // 3], message[-most // 4 :]
    if "\n" in first:
        first = first[: first.rindex("\n")]
    if "\n" in last:
        last = last[last.index("\n") + 1 :]
    left_out = len(message) - len(first) - len(last)
    return f"{first}\n... ({left_out} characters left out) ...\n{last}"


def _end(error: Exception, message: str, code: str) -> NoReturn:
    message = clipped(message)
    if _tracebacks_shown:
        traceback.print_exception(error)
    print(f"error: {message} [{code}]" if code else f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _tame_streams() -> None:
    """Let printing never be what fails: no stream where the caller closed it, a locale that lacks a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (stays open as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_unwritable_output() -> None:
    """If stdout's reader went away or its device is full, point it at nothing: the interpreter flushes it once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
