"""The tree is clean: lint, format, and the one import-path line that the commands in `utils/` need."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff_is_content(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_library_changes_the_import_path_in_its_commands_only():
    touching = [path.name for path in (ROOT / "utils").rglob("*.py") if "sys.path" in path.read_text()]
    assert set(touching) <= {"merger.py", "evaluator.py", "searcher.py"}


def test_no_room_of_utils_shadows_a_package():
    """`python3 utils/merger.py` puts `utils/` first on the import path for a moment."""
    requirements = (ROOT / "requirements-test.txt").read_text() + (ROOT / "requirements.txt").read_text()
    packages = set(re.findall(r"^[a-z][\w-]*", requirements, flags=re.M)) | {"yaml", "tqdm", "tokenizers", "numpy"}
    rooms = {path.stem for path in (ROOT / "utils").glob("*")}
    assert not rooms & (packages | set(sys.stdlib_module_names))
