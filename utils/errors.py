"""The one exception a user sees, and how a command ends because of it.

A mistake in a config, a flag, a file or a folder raises `UserError`; `run_command` prints its message and its code on
stderr and ends the process with exit code 2, without a traceback unless `--traceback` asks for one. Anything else that
goes wrong is a defect of this project and keeps its traceback.
"""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn, TextIO

from utils.signals import EXIT_SIGNAL, NOTHING_LEFT, is_finished, unwind_on_signals
from utils.trial import allow_trials

EXIT_USER_ERROR = 2
_MOST_PROBLEMS = 30
_LONGEST_MESSAGE = 2048  # characters
_STDOUT = "standard output"
LIMITS = {
    errno.EMFILE: "`ulimit -n 4096` allows more",
    errno.EFBIG: "`ulimit -f unlimited` allows larger ones, on a file system that does",
}
_WHAT_IS_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # true the next time as well
_NO_MEMORY = ("can't start new thread", "DefaultCPUAllocator: ")  # in what is raised beside a `MemoryError`


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


def reason(error: OSError) -> str:
    """What the system says of an error; of a limit that it sets to the process, with what lifts it."""
    words = error.strerror or str(error)
    return f"{words} ({LIMITS[error.errno]})" if error.errno in LIMITS else words


def is_of_the_moment(error: BaseException) -> bool:
    """Whether an error came of what the system refused just then (a read, a descriptor), not of what was tried.

    Who tries several things and leaves out those that are refused must not leave one out for that: the same line would
    come to another result the next time. A file that is not there is a fact about what was tried.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _WHAT_IS_MISSING:
            return True
        cause = cause.__cause__
    return False


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

    Exit codes: 0 done; 2 a `UserError`, a package that is not installed, an operating-system error such as a full disk or
    a stdout that cannot be written (`| head`), or memory that ran out; 130 Ctrl-C, 143 termination, 129 hang-up. Once the
    result is published, it is 0 after a signal or an error of the system, too. What an exception has as `kept`
    (`utils/publishing/kept.py`) is said in every case.
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
        _settle(sys.stdout)
        if is_finished():
            return
        _print(f"interrupted; {_kept(interrupt) or NOTHING_LEFT}")
        sys.exit(EXIT_SIGNAL + getattr(interrupt, "signum", signal.SIGINT))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "utils"):
            _say_kept(error)
            raise
        _end(error, f"{error}; install the requirements: pip install -r requirements.txt", "package-missing")
    except OSError as error:
        _end_by_the_system(error)
    except Exception as error:
        if is_memory(error):
            text = "memory ran out; give the process more: batch systems and `ulimit -v` set limits"
            _end(error, f"{text}; {_kept(error) or NOTHING_LEFT}", "memory-host")
        _say_kept(error)  # a defect of this project, with its traceback
        raise


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out on the host, or the room for threads."""
    refused = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return isinstance(error, MemoryError) or refused


def _kept(error: BaseException) -> str:
    """What an exception says of the work that stays, "" if none does."""
    return str(getattr(error, "kept", ""))


def _say_kept(error: BaseException) -> None:
    if kept := _kept(error):
        _print(kept)


def _print(line: str) -> None:
    """A last word on stderr; where that has no reader any more either, it is not said."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    _settle(sys.stderr)


def _end_by_the_system(error: OSError) -> None:
    """Say what the system refused: to write to stdout, or anything else. Returns if the result is published."""
    _settle(sys.stdout)
    what = f"{reason(error)}{f' ({error.filename})' if error.filename else ''}"
    if is_finished():
        _print(f"warning: {what}; the result is complete and in its place")
        return
    left = _kept(error) or NOTHING_LEFT
    if error.filename == _STDOUT:
        _end(error, f"{what}: let it go to a file, or to a reader that takes all of it; {left}", "stdout-unwritable")
    if _is_of_the_current_folder(error):
        text = "the folder in which this command was typed was removed: cd into one that is there"
        _end(error, f"{text}; {left}", "folder-removed")
    _end(error, f"{what}; {left}", "os-error")


def _is_of_the_current_folder(error: OSError) -> bool:
    """Whether there is no current folder any more, which the system says without a name."""
    if error.errno != errno.ENOENT or error.filename:
        return False
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def clipped(message: str) -> str:
    """A message of at most about 2,000 characters: of a longer one the middle is left out, in whole lines where it can be."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    first, last = message[: _LONGEST_MESSAGE * 2 // 3], message[-_LONGEST_MESSAGE // 4 :]
    if "\n" in first:
        first = first[: first.rindex("\n")]
    if "\n" in last:
        last = last[last.index("\n") + 1 :]
    left_out = len(message) - len(first) - len(last)
    return f"{first}\n... ({left_out} characters left out) ...\n{last}"


def _end(error: Exception, message: str, code: str) -> NoReturn:
    _settle(sys.stdout)
    message = clipped(message)
    if _tracebacks_shown:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    _print(f"error: {message} [{code}]" if code else f"error: {message}")
    sys.exit(EXIT_USER_ERROR)


def _tame_streams() -> None:
    """Let printing fail only where stdout cannot be written, and be named then.

    It does not where the caller closed a stream, or where the locale lacks a character.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (stays open as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__ and "write" not in vars(sys.stdout):  # of this very object: its class is not ours
        sys.stdout.write, sys.stdout.flush = _naming_stdout(sys.stdout.write), _naming_stdout(sys.stdout.flush)


def _naming_stdout(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, with stdout named in the errors that it raises, as the system names files in those of others."""

    def named(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            error.filename = _STDOUT
            raise

    return named


def _settle(stream: TextIO) -> None:
    """If a stream's reader went away or its device is full, point it at nothing.

    The interpreter flushes it once more, and would end with an exit code of its own.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
