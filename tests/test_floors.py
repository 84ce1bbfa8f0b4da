"""Imports between the rooms of `utils/` only go down, and no files of a room import each other in a circle."""

import ast
import re
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

UTILS = ROOT / "utils"
FLOORS = (
    {""},
    {"publishing"},
    {"models"},
    {"pair"},
    {"passes", "workers"},
    {"recipes"},
    {"merging"},
    {"guidance"},
    {"evaluation"},
    {"searching", "reports"},
    {"commands"},
)
COMMANDS = {"utils.merger", "utils.evaluator", "utils.searcher"}


def floor_of(module: str) -> int:
    return next(floor for floor, packages in enumerate(FLOORS) if package_of(module) in packages)


def package_of(module: str) -> str:
    first = module.split(".")[1]
    return first if (UTILS / first).is_dir() else ""


@cache
def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def arrows() -> list[tuple[str, str]]:
    """Every import of one module of `utils/` by another, late ones included."""
    found = []
    for path in sorted(UTILS.rglob("*.py")):
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if is_module(name) else node.module for name in inner]
            else:
                continue
            found += [(here, name) for name in names if name.startswith("utils.") and is_module(name)]
    return sorted(set(found))


def test_every_package_has_a_floor():
    packages = {path.parent.name for path in UTILS.glob("*/__init__.py")}
    assert packages <= set().union(*FLOORS)


def test_arrows_only_go_down():
    upward = [
        f"{source} imports {target}"
        for source, target in arrows()
        if source not in COMMANDS and package_of(source) != package_of(target) and floor_of(target) >= floor_of(source)
    ]
    assert not upward, "\n".join(upward)


def test_commands_are_imported_by_nothing():
    assert not [arrow for arrow in arrows() if arrow[1] in COMMANDS]


def test_a_guidance_method_knows_no_other():
    def method(module: str) -> str:
        parts = module.split(".")
        inside = parts[1:2] == ["guidance"] and len(parts) > 2 and (UTILS / "guidance" / parts[2]).is_dir()
        return parts[2] if inside else ""

    crossing = [arrow for arrow in arrows() if method(arrow[0]) and method(arrow[1]) not in ("", method(arrow[0]))]
    assert not crossing


def test_pieces_of_a_merge_know_the_plan_and_are_not_known_by_it():
    """What passes over a merge that is not written yet is made with does not depend on the command that writes it."""
    planners = {f"utils.merging.{name}" for name in ("plan", "settings", "parameters", "inputs", "recipe_file")}
    assert not [arrow for arrow in arrows() if arrow[0] in planners and arrow[1].startswith("utils.merging.pieces")]


def test_one_file_imports_mergekit():
    importing = {
        path.relative_to(UTILS).as_posix()
        for path in UTILS.rglob("*.py")
        if re.search(r"^\s*(from|import) mergekit\b|import_module\(.mergekit", path.read_text(), flags=re.M)
    }
    assert importing == {"mergekit_api.py"}


SLOW = {"torch", "numpy", "pandas", "scipy", "transformers", "accelerate", "datasets", "safetensors", "tqdm"}
SLOW |= {
    "mergekit",
    "matplotlib",
    "optuna",
    "lm_eval",
    "ray",
    "peft",
    "utils.mergekit_api",
}  # it loads mergekit when asked


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name.startswith("utils.") and is_module(name) else node.module for name in inner]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@cache
def at_the_top(path: Path) -> list[str]:
    return [name for node in tree(path).body for name in imported(node)] if path.is_file() else []


@cache
def loaded(module: str) -> frozenset[str]:
    """What an import of a module loads, by the imports at the top: modules of `utils/`, and libraries."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        path = (ROOT / name.replace(".", "/")).with_suffix(".py")
        found.add(name if name.startswith("utils.") else name.partition(".")[0])
        waiting += [name for name in at_the_top(path) if name not in found]
    return frozenset(found)


def test_a_late_import_is_of_what_is_slow():
    """Inside a function stands only what loads libraries that its file does without, or what leads back to the file."""
    for path in UTILS.rglob("*.py"):
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if here in {
            *COMMANDS,
            "utils.workers.ray_piece",
        }:  # `--help` answers without the program; a piece is sent alone
            continue
        functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
        for name in {name for function in functions for node in ast.walk(function) for name in imported(node)}:
            if name.startswith("utils.") and is_module(name):
                slow = loaded(name) & SLOW - loaded(here)
                assert slow or here in loaded(name), f"{here} could import {name} at its top"


def test_no_package_has_a_circle():
    below: dict[str, set[str]] = {}
    for source, target in arrows():
        below.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for target in below.get(module, ()):
            visit(target, (*path, module))
        done.add(module)

    for module in sorted(below):
        visit(module, ())


def test_the_walk_sees_the_tree():
    assert ("utils.merger", "utils.errors") in arrows()
    assert len({source for source, _ in arrows()}) > 80
    assert Path(UTILS / "guidance/lewis/method.py").exists()
