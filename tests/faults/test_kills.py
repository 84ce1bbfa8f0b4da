"""Kill a command before every call that changes a file: the same line typed again ends as if nothing had been.

python -m pytest tests/faults/test_kills.py            a few points of a merge, by real kills
python -m pytest tests/faults/test_kills.py -m slow    all points of all commands, in parts

A kill leaves what lies there before the call, so that one run shows all points: it stands still before each call while the
tree is taken into memory, and the line is typed again over every tree that differs from the others. (Of the searcher's
database what differs is what SQLite reads in it, after it has undone half transactions.) The first parts hold a tree of every
call from every place in the code, for every file.
"""

import csv
import io
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Server
from tests.faults.outcomes import (
    MEASURED,
    beginning,
    by_place,
    call_of,
    calls_of,
    check_result,
    found_in,
    noted,
    plain_name,
    run,
    words_of,
)
from tests.faults.pair import COMMANDS
from tests.faults.trees import Tree, digest_of_what_is_read, look, put, what_is_read

PARTS = {
    "measure": 1,
    "decide": 1,
    "merge": 1,
    "evaluate": 4,
    "search": 6,
}  # of about 30 trees where each takes seconds
INSIDE_PARTS = {"lewis": 1, "saliency_budget": 3, "sens_merging": 1, "gram_mean": 2}
_SECONDS = re.compile(rb"(?<=seconds)(q.|r.{4})(G.{8})+", re.DOTALL)  # floats that a pickle holds under that name
_OF_A_RUN = {
    "sums.json": (rb'(?<="result.pt": )\d+',),
    "manifest.json": (
        rb'(?<="created": )"[^"]*"',
        rb"\b\d{19}\b",
        rb'"(?:report\.html|trials\.csv)": "[0-9a-f]{64}"',
    ),
    ".progress": (rb"\b\d{19}\b",),  # times of change in nanoseconds
    ".journal.json": (rb"\b\d{19},\s+\d+",),  # and inodes
    "report.html": (MEASURED.encode(),),
}
REAL = 6  # kills that are compared with the trees


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
    wrong: list[str] = []
    for calls, tree in _part(trees, part, PARTS[command]):
        put(tree, folder / "out")
        with noted(wrong, calls):
            check_result(folder, command, expected, old, calls)
            done = faulty_server.run(*words_of(command, again), cwd=folder)
            assert done["code"] == 0 and "Traceback" not in done["stderr"], done["stderr"]
            assert found_in(folder) == expected
    assert not wrong, "\n".join(wrong)


Trees = dict[str, tuple[list[str], Tree]]  # each with the calls that it lies there before


def _trees(server: Server, folder: Path, words: list[str], log: Path, **more: Any) -> Trees:
    """The different trees before the calls of a run that ends well: first those of a call of each case, see `by_place`."""
    found: Trees = {}
    order = []

    def watch(number: int) -> None:
        tree = look(folder / "out")
        key = digest_of_what_is_read(tree)
        found.setdefault(key, ([], tree))
        order.append(key)

    log.unlink(missing_ok=True)
    stacks = log.with_name("stacks")
    done = server.run(*words, cwd=folder, root=folder / "out", log=log, watch=watch, stacks=stacks, **more)
    assert done["code"] == 0, done["stderr"]
    calls, chance = calls_of(log), random.Random(1)
    for key, call in zip(order, calls, strict=True):
        found[key][0].append(call)
    first = dict.fromkeys(order[chance.choice(case) - 1] for case in by_place(calls, stacks))
    print(f"{len(calls)} calls before {len(found)} trees, {len(first)} of them of all cases")
    return {key: found[key] for key in [*first, *chance.sample(list(found.keys() - first), len(found) - len(first))]}


def _part(trees: Trees, part: int, parts: int) -> list[tuple[list[str], Tree]]:
    size = -(-len(trees) // parts)
    chosen = list(trees.values())[part * size : (part + 1) * size]
    print(f"part {part + 1}: {sum(len(calls) for calls, _ in chosen)} calls, {len(chosen)} trees")
    return chosen


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
    calls = calls_of(tmp_path / "calls")
    turning = [number for number, call in enumerate(calls, 1) if call.split()[1].startswith("rename")]
    for at in sorted({1, len(calls), *turning[:1], *turning[-1:], *range(5, len(calls), len(calls) // (REAL - 3))}):
        put(start, folder / "out")
        killed = run(faulty_server, command, folder, tmp_path / "calls", again, at=at)
        assert killed["code"] == -9 and call_of(tmp_path / "calls", at), (at, killed)
        assert _form(look(folder / "out")) == _form(by_number[at]), (at, calls[at - 1])
        check_result(folder, command, expected, old, at)
        done = faulty_server.run(*words_of(command, again), cwd=folder)
        assert done["code"] == 0, (at, done["stderr"])
        assert found_in(folder) == expected, at


def _form(tree: Tree) -> dict[str, tuple[str, int, bytes | list]]:
    """Names, kinds, modes and bytes, without what differs from run to run: random parts of hidden names, times."""
    found = {plain_name(name): (entry.kind, entry.mode, _steady(tree, name)) for name, entry in tree.items()}
    assert len(found) == len(tree), f"two of these names became one: {sorted(tree)}"
    return found


def _steady(tree: Tree, name: str) -> bytes | list:
    """The content of a file without times, and without the hashes of files that hold times."""
    content, base = tree[name].content, name.rpartition("/")[2]
    if base == "trials.csv":
        rows = list(csv.reader(content.decode().splitlines()))
        return [[cell for key, cell in zip(rows[0], row, strict=False) if key != "seconds"] for row in rows]
    if base.startswith("study.db"):  # a table of trials holds their times
        found = what_is_read(tree, name)
        return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+", b"time", found.content)
    if base == "result.pt" and zipfile.is_zipfile(
        io.BytesIO(content)
    ):  # a piece says how long its parts took, and torch gives every file a number
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {own: archive.read(own) for own in archive.namelist() if not own.endswith("serialization_id")}
        return [(own, _SECONDS.sub(b"", part)) for own, part in parts.items()]
    for pattern in _OF_A_RUN.get(base, ()):
        content = re.sub(pattern, b"", content)
    return content


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("method", "part"),
    [
        pytest.param(method, part, id=f"{method}-{part + 1}-of-{parts}")
        for method, parts in INSIDE_PARTS.items()
        for part in range(parts)
    ],
)
def test_a_kill_inside_a_model_is_mended_by_the_same_line(faulty_server, folder, tmp_path, method, part):
    """Passes that write down where they stand at every block."""
    useless = ["--accept_useless_text"] if method != "lewis" else []  # random models gain nothing on it
    words = [*words_of("measure"), "--guidance", method, "--dtype", "float32", *useless]
    beginning(faulty_server, "measure", folder, False)
    trees = _trees(faulty_server, folder, words, tmp_path / "calls", snapshots=1)
    expected = found_in(folder)
    assert any("snapshot" in call for calls, _ in trees.values() for call in calls)
    wrong: list[str] = []
    for calls, tree in _part(trees, part, INSIDE_PARTS[method]):
        put(tree, folder / "out")
        with noted(wrong, calls):
            done = faulty_server.run(*words, cwd=folder, snapshots=1)
            assert done["code"] == 0, done["stderr"]
            assert found_in(folder) == expected
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("command", ["measure", "merge"])
def test_a_kill_at_any_time_is_mended_by_the_same_line(faulty_server, folder, tmp_path, command):
    start, _ = beginning(faulty_server, command, folder, False)
    seconds = []
    for _ in range(4):
        put(start, folder / "out")
        whole = run(faulty_server, command, folder, tmp_path / "calls")
        assert whole["code"] == 0, whole["stderr"]
        seconds.append(whole["seconds"])
    expected, chance = found_in(folder), random.Random(1)
    shortest = min(seconds[1:])  # the first has more to import
    killed = 0
    for _ in range(60):
        put(start, folder / "out")
        first = run(faulty_server, command, folder, tmp_path / "calls", limit=chance.uniform(0, shortest))
        killed += first["code"] == -9
        check_result(folder, command, expected, None, first)
        done = run(faulty_server, command, folder, tmp_path / "calls")
        assert done["code"] == 0, (first, done["stderr"])
        assert found_in(folder) == expected
    assert killed > 30
