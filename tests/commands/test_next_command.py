"""The command to paste next runs as it is printed, from where the user stands.

python -m pytest tests/commands/test_next_command.py
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.commands.next_command import next_command, python_name, script_path


def test_flags_and_quoting():
    flags = {"out_dir": "my out; rm -rf $HOME/it's", "overwrite": True, "plot": False, "lambda": None, "gamma": 0.3}
    line = next_command("lewis_merge.py", flags, ["a b"])
    assert shlex.split(line.replace("\\\n", ""))[2:] == [
        "--out_dir", "my out; rm -rf $HOME/it's", "--overwrite", "--gamma", "0.3", "a b"
    ]  # fmt: skip


@pytest.mark.parametrize("where", [".", "tests", "outside"])
def test_the_paths_are_right_from_where_the_user_stands(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path if where == "outside" else ROOT / where)
    line = next_command("lewis_merge.py", {"help": True})
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--gamma" in done.stdout
    assert (
        script_path("utils/merger.py")
        == {
            ".": "utils/merger.py",
            "tests": "../utils/merger.py",
            "outside": str(ROOT / "utils/merger.py"),
        }[where]
    )


def test_the_interpreter_is_the_one_that_runs(tmp_path, monkeypatch):
    """Its name where the shell finds it by that, its path from here in an environment that is not active."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert python_name(sys.executable) in ("python3", "python")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert python_name(str(tmp_path / ".venv/bin/python")) == ".venv/bin/python"
    monkeypatch.setenv("PATH", f"{tmp_path}/.venv/bin:{os.environ['PATH']}")
    assert python_name(str(tmp_path / ".venv/bin/python")) == "python"
    assert python_name("") == "python3"
