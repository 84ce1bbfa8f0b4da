"""The one exception a user sees, and how a command ends because of it.

A mistake in a config, a flag, a file or a folder raises `UserError`; `run_command` prints its message on stderr and
ends the process with exit code 2, without a traceback. Anything else that goes wrong is a defect of this project and
keeps its traceback.
"""

import os
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_MOST_PROBLEMS = 30


class UserError(Exception):
    """Something the user can mend. The message names the key or file, the value and the remedy."""


def brief(error: BaseException, limit: int = 240) -> str:
    """What another library's exception says, on one line of at most `limit` characters; its type if it says nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= limit else words[: limit - 3] + "..."


def raise_collected(problems: Iterable[str], heading: str) -> None:
    """Raise one `UserError` that lists every problem found, or return if there is none."""
    problems = list(dict.fromkeys(problems))
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(f"{heading}: {problems[0]}")
    lines = "\n".join(f"  - {problem}" for problem in problems[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        lines += f"\n  - and {len(problems) - _MOST_PROBLEMS} more"
    raise UserError(f"{heading}: {len(problems)} problems\n{lines}")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process the way every command of this project ends.

    Exit codes: 0 done; 2 a `UserError`, a package that is not installed, or an operating-system error such as a full
    disk; 130 Ctrl-C; a closed stdout (`| head`) ends quietly with 2.
    """
    _tame_streams()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was left behind", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "utils"):
            raise
        print(f"error: {error}; install the requirements: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:
        _drop_unwritable_output()
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        _drop_unwritable_output()
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; nothing unfinished was left behind", file=sys.stderr)
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
