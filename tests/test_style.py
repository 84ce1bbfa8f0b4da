"""The tree is clean: lint, format, and the one import-path line that the commands in `utils/` need."""

import ast
import functools
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff_is_content(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_library_changes_the_import_path_in_its_commands_only():
    touching = [path.name for path in (ROOT / "utils").rglob("*.py") if "sys.path" in path.read_text()]
    assert set(touching) <= {"merger.py", "evaluator.py", "searcher.py"}


def test_no_package_of_utils_shadows_another():
    """`python3 utils/merger.py` puts `utils/` first on the import path for a moment."""
    names = {path.stem for path in (ROOT / "utils").iterdir()} - {"__init__", "__pycache__"}
    assert not names & (set(packages_distributions()) | set(sys.stdlib_module_names))


FOLDERS = ("utils", "demo", "benchmarks")
COMMANDS = [ROOT / "lewis_importance.py", ROOT / "lewis_merge.py"]
SOURCES = [*(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))), *COMMANDS]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def test_every_refusal_has_a_code_and_keeps_its_cause():
    for path in SOURCES:
        for node in nodes_of(path):
            where = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "Problem"):
                code = [*node.args[1:2], *(word.value for word in node.keywords if word.arg in ("code", "codes"))]
                assert code, f"{where}: no code"
                assert not isinstance(code[0], ast.Constant) or CODE.fullmatch(code[0].value), where
            if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant):
                assert node.cause.value is not None, f"{where}: `from None` loses the cause"


NAMED = {
    ast.Name: "id",
    ast.Attribute: "attr",
    ast.arg: "arg",
    ast.keyword: "arg",
    ast.FunctionDef: "name",
    ast.ClassDef: "name",
}
DIALECT = {"slip", "slips", "tell", "tells", "told", "twin", "twins", "room", "rooms"}


def test_names_are_words_of_the_field():
    """Not of a dialect of our own. Optuna's studies are asked and told."""
    for path in (*SOURCES, *TESTS):
        allowed = {"tell", "_tell"} if "search" in str(path) else set()
        names = {getattr(node, NAMED[type(node)]) or "" for node in nodes_of(path) if type(node) in NAMED}
        wrong = [name for name in names - allowed if DIALECT & set(name.lower().split("_"))]
        assert not wrong, f"{path}: {wrong}"


def test_tests_match_codes():
    """A refusal is recognized by its code (`tests/refusals.py`); the prose of a `UserError` is never what is matched."""
    for path in TESTS:
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "raises":
                loose = ast.unparse(node.args[0]) in ("UserError", "Exception")
                assert not loose or not node.keywords, f"{path}, line {node.lineno}: use `refused`"
            if isinstance(node, ast.Compare) and path.name not in ("refusals.py", "test_errors.py", "test_demo.py"):
                left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
                assert (left[-10:], right) != ("returncode", "2"), f"{path}, line {node.lineno}: use `refusal_code`"


def test_tests_share_builders_and_not_each_others_fixtures():
    """What two modules of tests need lies in a file without tests."""
    for path in TESTS:
        modules = [node.module or "" for node in nodes_of(path) if isinstance(node, ast.ImportFrom)]
        assert not [module for module in modules if module.startswith("tests.") and ".test_" in module], path


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_touch_nothing_private():
    """What a test varies or looks at is public: a parameter, or a name without an underscore."""
    for path in TESTS:
        imported = set()
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FOLDERS):
                imported |= {alias.asname or alias.name for alias in node.names}
        touched = {name for name in imported if is_private(name)}
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in imported and is_private(node.attr):
                touched.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):
                words = [word.value for word in node.args[:2] if isinstance(word, ast.Constant)]
                touched |= {
                    part for word in words if isinstance(word, str) for part in word.split(".") if is_private(part)
                }
        assert not touched, f"{path}: {touched}"


def test_the_fast_tests_are_there():
    for line in (ROOT / "tests/fast.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert (ROOT / path).is_file(), line
        assert not name or f"def {name}(" in (ROOT / path).read_text(), line
