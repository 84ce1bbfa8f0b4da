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


class UserError(Exception):
    """Something the user can mend. The message names the key or file, the value and the remedy."""


def raise_collected(problems: Iterable[str], heading: str) -> None:
    """Raise one `UserError` that lists every problem found, or return if there is none."""
    problems = list(dict.fromkeys(problems))
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(f"{heading}: {problems[0]}")
    lines = "\n".join(f"  - {problem}" for problem in problems)
    raise UserError(f"{heading}: {len(problems)} problems\n{lines}")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process the way every command of this project ends.

    Exit codes: 0 done; 2 a `UserError` or an operating-system error such as a full disk; 130 Ctrl-C; a closed
    stdout (`| head`) ends quietly.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader went away; point stdout at nothing so that the interpreter's own flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}. Nothing was published.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
