"""Kill a command before every call that changes a file: the same line typed again ends as if nothing had been.

python -m pytest tests/faults/test_kills.py            a few points of a merge, by real kills
python -m pytest tests/faults/test_kills.py -m slow    all points of all commands, in parts

A kill leaves what lies there before the call, so that one run shows all points: it stands still before each call while the
tree is taken into memory, and the line is typed again over every tree that differs from the others. (Of the searcher's
database what differs is what SQLite reads in it, after it has undone half transactions.)
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Server
from tests.faults.outcomes import beginning, check_result, found_in, noted, run, words_of
from tests.faults.pair import COMMANDS, copy_of, make_pair
from tests.faults.trees import Tree, digest_of_what_is_read, look, put

PARTS = {
    "measure": 1,
    "decide": 1,
    "merge": 1,
    "evaluate": 4,
    "search": 8,
}  # of about 30 trees where each takes seconds
REAL = 6  # kills that are compared with the trees


@pytest.fixture(scope="module")
def folder(faulty_server, tmp_path_factory) -> Path:
    """The pair with a measurement of it, and a bystander's files in the folder of the results."""
    made = make_pair(tmp_path_factory.mktemp("pair") / "made")
    done = faulty_server.run(*words_of("measure", out="dfs"), cwd=made)
    assert done["code"] == 0, done["stderr"]
    return copy_of(made, made.with_name("copy"))


def _cases(parts: dict[str, int]) -> Iterator[Any]:
    for command, number in parts.items():
        for again in (False, True) if command != "search" else (False,):
            for part in range(number):
                name = f"{command}-{'again' if again else 'fresh'}-{part + 1}-of-{number}"
                yield pytest.param(command, again, part, id=name, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])


@pytest.mark.parametrize(("command", "again", "part"), _cases(PARTS))
def test_a_kill_before_any_call_is_mended_by_the_same_line(faulty_server, folder, tmp_path, command, again, part):
    _, old = beginning(faulty_server, command, folder, again)
    trees = _trees(faulty_server, folder, words_of(command, again), tmp_path / "calls")
    expected = found_in(folder)
    chosen = random.Random(1).sample(list(trees.values()), len(trees))[part :: PARTS[command]]
    wrong: list[str] = []
    for calls, tree in chosen:
        put(tree, folder / "out")
        with noted(wrong, calls):
            check_result(folder, command, expected, old, calls)
            done = faulty_server.run(*words_of(command, again), cwd=folder)
            assert done["code"] == 0 and "Traceback" not in done["stderr"], done["stderr"]
            assert found_in(folder) == expected
    assert not wrong, "\n".join(wrong)
    print(f"{sum(len(calls) for calls, _ in chosen)} calls, {len(chosen)} trees")


def _trees(server: Server, folder: Path, words: list[str], log: Path, **more: Any) -> dict[str, tuple[list[str], Tree]]:
    """The different trees before the calls of a run that ends well, each with the calls that it lies there before."""
    found: dict[str, tuple[list[str], Tree]] = {}
    order = []

    def watch(number: int) -> None:
        tree = look(folder / "out")
        key = digest_of_what_is_read(tree)
        found.setdefault(key, ([], tree))
        order.append(key)

    log.unlink(missing_ok=True)
    done = server.run(*words, cwd=folder, root=folder / "out", log=log, watch=watch, **more)
    assert done["code"] == 0, done["stderr"]
    for key, call in zip(order, log.read_text().splitlines(), strict=True):
        found[key][0].append(call)
    return found


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("merge", False),
        *(
            pytest.param(command, again, marks=pytest.mark.slow)
            for command in COMMANDS
            for again in (False, True)
            if (command, again) not in [("merge", False), ("search", True)]
        ),
    ],
)
def test_a_real_kill_leaves_the_tree_that_was_taken_into_memory(faulty_server, folder, tmp_path, command, again):
    start, old = beginning(faulty_server, command, folder, again)
    trees = _trees(faulty_server, folder, words_of(command, again), tmp_path / "calls")
    expected = found_in(folder)
    by_number = {int(call.split()[0]): tree for calls, tree in trees.values() for call in calls}
    calls = (tmp_path / "calls").read_text().splitlines()
    turning = [number for number, call in enumerate(calls, 1) if call.split()[1].startswith("rename")]
    for at in sorted({1, len(calls), *turning[:1], *turning[-1:], *range(5, len(calls), len(calls) // (REAL - 3))}):
        put(start, folder / "out")
        killed = run(faulty_server, command, folder, tmp_path / "calls", again, at=at)
        assert killed["code"] == -9, (at, killed)
        assert _form(look(folder / "out")) == _form(by_number[at]), (at, calls[at - 1])
        check_result(folder, command, expected, old, at)
        done = faulty_server.run(*words_of(command, again), cwd=folder)
        assert done["code"] == 0, (at, done["stderr"])
        assert found_in(folder) == expected, at


def _form(tree: Tree) -> dict[str, tuple[str, int, bytes | int]]:
    """Names, kinds, modes and bytes, without what differs from run to run: names of temporary folders, times, hashes."""
    found = {}
    for name, entry in tree.items():
        plain = re.sub(r"(?<=[./])[a-z0-9_]{8,12}(?=\.part|\.old|/|$)", "x", name)
        content: bytes | int = entry.content
        if name.endswith((".json", ".csv", ".html", ".progress")):
            content = len(re.sub(rb"[0-9a-f.+-]+", b"", entry.content))
        elif "study.db" in name:
            content = len(entry.content)
        found[plain] = (entry.kind, entry.mode, content)
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("method", ["lewis", "saliency_budget", "sens_merging", "gram_mean"])
def test_a_kill_inside_a_model_is_mended_by_the_same_line(faulty_server, folder, tmp_path, method):
    """Passes that write down where they stand at every block."""
    useless = ["--accept_useless_text"] if method == "gram_mean" else []  # random models gain nothing on it
    words = [*words_of("measure"), "--guidance", method, "--dtype", "float32", *useless]
    beginning(faulty_server, "measure", folder, False)
    trees = _trees(faulty_server, folder, words, tmp_path / "calls", snapshots=1)
    expected = found_in(folder)
    assert any("snapshot" in call for calls, _ in trees.values() for call in calls)
    wrong: list[str] = []
    for calls, tree in trees.values():
        put(tree, folder / "out")
        with noted(wrong, calls):
            done = faulty_server.run(*words, cwd=folder, snapshots=1)
            assert done["code"] == 0, done["stderr"]
            assert found_in(folder) == expected
    assert not wrong, "\n".join(wrong)
    print(f"{sum(len(calls) for calls, _ in trees.values())} calls, {len(trees)} trees")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("command", ["measure", "merge"])
def test_a_kill_at_any_time_is_mended_by_the_same_line(faulty_server, folder, tmp_path, command):
    start, _ = beginning(faulty_server, command, folder, False)
    whole = run(faulty_server, command, folder, tmp_path / "calls")
    expected, chance = found_in(folder), random.Random(1)
    killed = 0
    for _ in range(60):
        put(start, folder / "out")
        first = run(faulty_server, command, folder, tmp_path / "calls", limit=chance.uniform(0, whole["seconds"]))
        killed += first["code"] == -9
        check_result(folder, command, expected, None, first)
        done = run(faulty_server, command, folder, tmp_path / "calls")
        assert done["code"] == 0, (first, done["stderr"])
        assert found_in(folder) == expected
    assert killed > 30
