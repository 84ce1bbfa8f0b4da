"""Ctrl-C, termination and hang-up: they unwind the stack, wait while a result moves into its place, and then mean nothing."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SIGNAL = 128  # and the signal's number: 130 Ctrl-C, 143 termination, 129 hang-up
NOTHING_LEFT = "nothing unfinished was left behind"


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


_one_result = _finished = False


def end_on_signals() -> None:
    """Let every stopping signal end the process at once, with its exit code and a line.

    For the time in which a command's own modules are imported: nothing has been made then, and nothing unwinds the stack.
    A signal that the caller had set to be ignored stays ignored.
    """
    _let_handle(_end)


def unwind_on_signals(*, one_result: bool = False) -> None:
    """Let every stopping signal raise `Interrupted`, so that temporary files are removed.

    A signal that the caller had set to be ignored (`nohup`) stays ignored. `one_result`: the command makes one, and has
    succeeded with it (`finish`).
    """
    global _one_result, _finished
    _one_result, _finished = one_result, False
    _let_handle(_interrupt)


def finish() -> None:
    """A result is published: of a command that makes one, a signal that comes from now on changes nothing any more."""
    global _finished
    _finished = _one_result


def is_finished() -> bool:
    """Whether the command has succeeded."""
    return _finished


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait until the block is done, however many come; the first of them is then handled as ever."""
    if threading.current_thread() is not threading.main_thread():  # signals never interrupt other threads
        yield
        return
    held: list[int] = []
    previous = {
        signum: signal.signal(signum, lambda number, frame: held.append(number))
        for signum in STOPPING
        if callable(signal.getsignal(signum))
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if held:
        previous[held[0]](held[0], None)


def _let_handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for signum in STOPPING:
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler, _end):
            signal.signal(signum, handler)


def _end(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, f"interrupted; {NOTHING_LEFT}\n".encode())
    os._exit(EXIT_SIGNAL + signum)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    if not _finished:
        raise Interrupted(signum)
