"""A pytest plugin: what has passed is not run again, and when the time is up the rest waits for the next run of the same line.

python -m pytest -p tests.resumable --passed .pytest_cache/slow --minutes 30 -m slow
"""

import math
import os
import time
from pathlib import Path

import pytest

_START = time.monotonic()
_UP = "the time is up: the same line goes on"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the two options."""
    parser.addoption("--passed", type=Path, required=True, help="the file of the tests that have passed")
    parser.addoption("--minutes", type=float, default=math.inf, help="after them no other test is begun")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    file = config.getoption("passed")
    passed = set(file.read_text().splitlines()) if file.is_file() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing once the time is up."""
    if time.monotonic() > _START + 60 * item.config.getoption("minutes"):
        pytest.skip(_UP)


class _Notes:
    def __init__(self, file: Path) -> None:
        self.file, self.waiting = file, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what passes, and count what waits."""
        self.waiting += report.skipped and _UP in str(report.longrepr)
        if report.when == "call" and report.passed:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what is left."""
        if self.waiting:
            terminalreporter.write_line(f"{self.waiting} tests wait: type the same line again")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Where nothing is left, that is no failure."""
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.file.is_file():
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    """One process takes the notes, also of several workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(_Notes(config.getoption("passed")))
