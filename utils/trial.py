"""Work with a stranger's files, done first in a fork of this process with limits of time and memory.

A hang, a crash of a library or a lack of memory then ends the fork, and this process says so. Whatever the fork raises is
left to this process to meet again. A fork has everything imported that this process has, so that nothing is waited for
but the work itself, and it works while this process goes on.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Protocol

CPU_SECONDS = 6  # for a step that reads small files
CPU_SECONDS_A_MEGABYTE = 0.5  # of the files it reads beside; a vocabulary of 44 MB takes 5 s
WALL_SECONDS = 60.0  # for a step, on a machine that is busy with other things
MEMORY = 3 * 2**28  # bytes more than this process has
MEMORY_A_BYTE = 30  # of the files beside; that vocabulary takes 14
_allowed = False


class Begin(Protocol):
    """Is called with the name of a step that begins, and with the bytes of the files that it reads."""

    def __call__(self, step: str, size: int = 0) -> None: ...


def allow_trials(allowed: bool = True) -> None:
    """From now on trials are made: this is a command's own process, whose threads do not compute yet when they begin."""
    global _allowed
    _allowed = allowed


class Trial:
    """A fork at work. `step` tells it apart in a message: what was being done when it died."""

    def __init__(self, work: Callable[[Begin], bytes | None]) -> None:
        """Begin the work, which is given what to call at each step; nothing where trials are not made.

        What it returns comes back as `made`, where the system has files without a name.
        """
        self._child, self._late, self.made = 0, False, b""
        if not _allowed or not hasattr(os, "fork"):
            return
        self._steps, writer = os.pipe()
        self._begun = b""
        os.set_blocking(self._steps, False)
        self._results = os.memfd_create("trial") if hasattr(os, "memfd_create") else None
        parent = os.getpid()
        self._child = os.fork()
        if not self._child:
            _be_the_fork(work, writer, self._results, parent)
        os.close(writer)
        atexit.register(self.close)

    def failure(self) -> str:
        """Wait for the fork; how it died and at which step, as a clause, or "" if it came through."""
        if not self._child:
            return ""
        status = self._wait()
        self._read_steps()
        os.close(self._steps)
        step, seconds, memory = json.loads((self._begun.splitlines() or [b'["starting", 0, 0]'])[-1])
        code, self._child = os.waitstatus_to_exitcode(status), 0
        self._take_results(code == 0)
        if code == 0:
            return ""
        how = {
            -signal.SIGXCPU: f"took more than {seconds} s of processor time",
            -signal.SIGKILL: f"took more than {WALL_SECONDS:g} s"
            if self._late
            else f"took more than {seconds} s of processor time or was killed for its memory",
            _NO_MEMORY: f"took more than {memory / 2**30:.2g} GiB of memory",
            _PANIC: "made a library give up",
        }.get(code, f"ended a process by signal {-code}" if code < 0 else f"ended a process with code {code}")
        return f"{step} {how}"

    def close(self) -> None:
        """End a fork that nobody waits for any more."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            os.close(self._steps)
            self._take_results(False)
            self._child = 0

    def _take_results(self, is_whole: bool) -> None:
        if self._results is not None:
            with open(self._results, "rb") as file:
                if is_whole:
                    file.seek(0)
                    self.made = file.read()

    def _wait(self) -> int:
        pause, waited, before = 0.001, 0.0, time.monotonic()
        while True:
            found, status = os.waitpid(self._child, os.WNOHANG)
            if found:
                return status
            if self._read_steps():
                waited = 0.0
            if waited > WALL_SECONDS:
                self._late = True
                os.kill(self._child, signal.SIGKILL)
                return os.waitpid(self._child, 0)[1]
            time.sleep(pause)
            pause = min(0.02, pause * 1.5)
            now = time.monotonic()
            waited += min(
                now - before, _LONGEST_PAUSE
            )  # this process may have been stopped (Ctrl-Z), and the fork with it
            before = now

    def _read_steps(self) -> bool:
        """Take in the names of the steps that have begun; whether there is a new one."""
        before = len(self._begun)
        with contextlib.suppress(BlockingIOError):
            while found := os.read(self._steps, 2**16):
                self._begun += found
        return len(self._begun) > before


_NO_MEMORY, _PANIC = 71, 72  # exit codes of a fork
_LONGEST_PAUSE = 1.0  # seconds that count between two looks at a fork
_PR_SET_PDEATHSIG = 1


def is_failure(error: BaseException) -> bool:
    """Whether an exception is a library's failure, its panics included, which are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _hand_back(made: bytes, results: int) -> None:
    """Write all of it or nothing: a limit to the size of files (`ulimit -f`) counts for files without a name, too."""
    left = memoryview(made)
    try:
        while left:
            left = left[os.write(results, left) :]
    except OSError:
        os.ftruncate(results, 0)


def _end_with(parent: int) -> None:
    """Have this fork end when its parent does, however that ends (Linux)."""
    if set_option := getattr(ctypes.CDLL(None), "prctl", None):
        set_option(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _be_the_fork(work: Callable[[Begin], bytes | None], writer: int, results: int | None, parent: int) -> None:
    code = 0
    try:
        _end_with(parent)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        faulthandler.disable()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        _limit(resource.RLIMIT_CORE, 0)
        with open("/proc/self/statm", encoding="ascii") as file:
            mine = int(file.read().split()[5]) * resource.getpagesize()  # what can be written to, threads' reserves not

        def begin(step: str, size: int = 0) -> None:
            seconds = CPU_SECONDS + math.ceil(CPU_SECONDS_A_MEGABYTE * size / 1e6)
            memory = MEMORY + MEMORY_A_BYTE * size
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
            _limit(resource.RLIMIT_DATA, mine + memory)
            os.write(writer, f"{json.dumps([step, seconds, memory])}\n".encode())

        begin("starting")
        made = work(begin)
        if made and results is not None:
            _hand_back(made, results)
    except MemoryError:
        code = _NO_MEMORY
    except BaseException as error:
        code = 0 if isinstance(error, Exception) or not is_failure(error) else _PANIC
    finally:
        os._exit(code)
