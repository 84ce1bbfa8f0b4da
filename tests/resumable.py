"""A pytest plugin: what has passed is not run again, and when the time is up the rest waits for the next run of the same line.

python -m pytest -p tests.resumable --passed .pytest_cache/slow --minutes 30 -m slow

Ends with 0 once everything has passed, with 75 while tests wait, and as pytest does where one fails or none was asked for.
"""

import math
import os
import time
from pathlib import Path

import pytest

UNFINISHED = 75  # the exit status while tests wait (sysexits.h: temporary failure)
_START = time.monotonic()
_UP = "the time is up: the same line goes on"
_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the two options."""
    parser.addoption("--passed", type=Path, required=True, help="the file of the tests that have passed")
    parser.addoption("--minutes", type=float, default=math.inf, help="after them no other test is begun")


@pytest.hookimpl(trylast=True)  # after `-m` and `-k`: only what they ask for counts
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    file = config.getoption("passed")
    passed = set(file.read_text().splitlines()) if file.is_file() else set()
    left_out = [item for item in items if item.nodeid in passed]
    config.stash[_LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in passed]
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = len(left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing once the time is up."""
    if time.monotonic() > _START + 60 * item.config.getoption("minutes"):
        pytest.skip(_UP)


class _Notes:
    def __init__(self, file: Path) -> None:
        self.file, self.waiting, self.left_out = file, 0, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what passes, and count what waits."""
        self.waiting += report.skipped and _UP in str(report.longrepr)
        if report.when == "call" and report.passed:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object, error: object | None) -> None:
        """A worker has collected the tests, and says how many it left out."""
        self.left_out = max(self.left_out, getattr(node, "workeroutput", {}).get("left_out", 0))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what is left."""
        if self.waiting:
            terminalreporter.write_line(f"{self.waiting} tests wait: type the same line again")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Where all has passed, that is no failure; where something waits, that is no success."""
        left_out = max(self.left_out, session.config.stash.get(_LEFT_OUT, 0))
        if self.waiting and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = UNFINISHED
        elif left_out and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    """One process takes the notes, also of several workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(_Notes(config.getoption("passed")))
