"""Work done in a fork first: what hangs, crashes or takes too much memory is said, and this process goes on.

python -m pytest tests/test_trial.py
"""

import ctypes
import itertools
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from utils import trial
from utils.trial import Trial, allow_trials, is_failure


@pytest.fixture(autouse=True)
def allowed():
    allow_trials()
    yield
    allow_trials(False)


def test_work_that_ends_well_or_with_an_error_is_no_failure():
    def fail(begin):
        raise ValueError("said by the process itself")

    assert Trial(lambda begin: begin("counting")).failure() == ""
    assert Trial(fail).failure() == ""


def test_a_loop_ends_with_its_time(monkeypatch):
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)

    def loop(begin):
        begin("rendering")
        while True:
            pass

    start = time.perf_counter()
    assert Trial(loop).failure() == "rendering took more than 1 s of processor time"
    assert time.perf_counter() - start < 20


def test_a_wait_ends_too(monkeypatch):
    monkeypatch.setattr(trial, "WALL_SECONDS", 0.2)
    assert Trial(lambda begin: time.sleep(60)).failure() == "starting took more than 0.2 s"


def test_time_in_which_the_command_itself_was_stopped_does_not_count(monkeypatch):
    clock = itertools.count(step=1000.0)
    monkeypatch.setattr(trial.time, "monotonic", lambda: next(clock))
    assert Trial(lambda begin: time.sleep(0.05)).failure() == ""


def test_a_fork_ends_with_its_command(tmp_path):
    script = """
        import os, signal, sys, time
        from pathlib import Path
        from utils.trial import Trial, allow_trials

        def work(begin):
            Path(sys.argv[1]).write_text(str(os.getpid()))
            time.sleep(60)

        allow_trials()
        one = Trial(work)
        while not Path(sys.argv[1]).exists() or not Path(sys.argv[1]).read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], cwd=Path(__file__).parent.parent, check=False)
    until = time.monotonic() + 10
    while is_alive(int(path.read_text())):
        assert time.monotonic() < until
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_does_not_come_back_whole_does_not_come_back():
    def work(begin):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return b"x" * 100_000

    one = Trial(work)
    assert (one.failure(), one.made) == ("", b"")


def test_a_kill_is_said():
    assert "was killed for its memory" in Trial(lambda begin: os.kill(os.getpid(), signal.SIGKILL)).failure()


def test_memory_is_limited(monkeypatch):
    monkeypatch.setattr(trial, "MEMORY", 2**28)

    def fill(begin):
        begin("reading")
        bytearray(2**30)

    assert Trial(fill).failure() == "reading took more than 0.25 GiB of memory"


def test_a_crash_is_said():
    def crash(begin):
        begin("loading")
        ctypes.string_at(8)

    assert Trial(crash).failure() == f"loading ended a process by signal {signal.SIGSEGV.value}"


class PanicException(BaseException):
    """As pyo3's."""


def test_a_panic_is_a_failure_and_an_interrupt_is_none():
    def panic(begin):
        begin("encoding")
        raise PanicException

    assert Trial(panic).failure() == "encoding made a library give up"
    assert is_failure(PanicException()) and is_failure(ValueError()) and not is_failure(KeyboardInterrupt())


def test_nothing_is_tried_outside_a_command():
    allow_trials(False)
    assert Trial(lambda begin: time.sleep(60)).failure() == ""


def test_each_step_has_its_own_time(monkeypatch):
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)

    def steps(begin):
        for number in range(3):
            begin(f"step {number}")
            start = time.process_time()
            while time.process_time() < start + 0.6:
                pass

    assert Trial(steps).failure() == ""
