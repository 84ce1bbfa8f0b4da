"""The tree is clean: lint, format, and the one import-path line that the commands in `utils/` need."""

import ast
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


SOURCES = [*sorted((ROOT / "utils").rglob("*.py")), ROOT / "lewis_importance.py", ROOT / "lewis_merge.py"]
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")


def calls_of(tree: ast.AST, *names: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_refusal_has_a_code_and_keeps_its_cause(path):
    tree = ast.parse(path.read_text())
    for call in calls_of(tree, "UserError", "Problem"):
        code = [*call.args[1:2], *(word.value for word in call.keywords if word.arg in ("code", "codes"))]
        assert code, f"line {call.lineno}: no code"
        if isinstance(code[0], ast.Constant):
            assert CODE.fullmatch(code[0].value), f"line {call.lineno}: {code[0].value!r}"
    hidden = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant) and node.cause.value is None
    ]
    assert not hidden, f"lines {hidden}: `from None` loses the cause"


def test_the_fast_tests_are_there():
    for line in (ROOT / "tests/fast.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert (ROOT / path).is_file(), line
        assert not name or f"def {name}(" in (ROOT / path).read_text(), line
