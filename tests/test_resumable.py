"""`make test-slow` goes on where it stopped.

python -m pytest tests/test_resumable.py
"""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.resumable import UNFINISHED

TESTS = """
import pathlib
def test_one(): pass
def test_two(): assert pathlib.Path("mended").exists()
"""


def _run(folder: Path, *words: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "xdist",
        "-p",
        "tests.resumable",
        "--passed",
        "notes/passed",
        "-p",
        "no:cacheprovider",
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, *words, "."], cwd=folder, env=environment, capture_output=True, text=True)
    return f"{done.stdout} exit {done.returncode}"


def test_only_what_has_not_passed_runs_again(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    waiting = _run(tmp_path, "--minutes", "0")
    assert "2 skipped" in waiting and "2 tests wait: type the same line again" in waiting
    assert waiting.endswith(f"exit {UNFINISHED}")
    for words in ((), ("-n", "1")):  # nothing has that name
        assert _run(tmp_path, "-k", "three", *words).endswith("exit 5")
    assert "1 failed, 1 passed" in _run(tmp_path)
    (tmp_path / "mended").touch()
    assert "1 passed" in _run(tmp_path, "-n", "1")  # a worker runs it, and the notes are taken beside it
    assert (tmp_path / "notes/passed").read_text().splitlines() == ["test_some.py::test_one", "test_some.py::test_two"]
    for words in ((), ("-n", "1")):  # nothing is left
        assert _run(tmp_path, *words).endswith("exit 0")
        assert _run(tmp_path, "-k", "two", *words).endswith("exit 0")
        assert _run(tmp_path, "-k", "three", *words).endswith("exit 5")
