"""How far a long piece of work is, on stderr: a bar on a screen, a line now and then in a file, nothing if asked to be quiet."""

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10
_SECONDS_BETWEEN_FRAMES = 0.2


class _Lines(tqdm):
    """The same words, each time on a line of their own: a file has no cursor that could go back."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """How one state of the bar is written; `close` ends the last line."""
        before = ""

        def write(state: str) -> None:
            nonlocal before
            file.write(before + state)
            file.flush()
            before = "\n"

        return write


def progress_bar(what: str, total: float, unit: str, *, quiet: bool = False, **more: Any) -> tqdm:
    """A bar to `update` and to `close`, or to use as a context.

    Args:
        what: what is being done, `measuring`.
        total: how many units it has.
        unit: what is counted.
        quiet: show nothing.
        more: what else tqdm takes, such as `unit_scale`.
    """
    screen = sys.stderr.isatty()
    return (tqdm if screen else _Lines)(
        desc=what,
        total=total,
        unit=unit,
        disable=quiet,
        file=sys.stderr,
        mininterval=_SECONDS_BETWEEN_FRAMES if screen else _SECONDS_BETWEEN_LINES,
        maxinterval=max(_SECONDS_BETWEEN_LINES, tqdm.monitor_interval),
        **more,
    )
