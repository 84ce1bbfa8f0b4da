"""Kill a command before every call that changes a file, and let every such call fail: nothing is lost or half there.

python -m pytest tests/faults/test_system_calls.py            a few points of a merge
python -m pytest tests/faults/test_system_calls.py -m slow    all points of all commands, in parts
"""

import contextlib
import csv
import errno
import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Server
from tests.faults.pair import BYSTANDERS, COMMANDS, RESULTS, copy_of, make_pair

FEW = 3


@pytest.fixture(scope="module")
def folder(faulty_server, tmp_path_factory) -> Path:
    """The pair with a measurement of it, and a bystander's files in the folder of the results."""
    made = make_pair(tmp_path_factory.mktemp("pair") / "made")
    done = faulty_server.run(*_words("measure", out="dfs"), cwd=made)
    assert done["code"] == 0, done["stderr"]
    return copy_of(made, made.with_name("copy"))


def _words(command: str, out: str | None = None) -> list[str]:
    return [out if out and word == RESULTS[command] else word for word in COMMANDS[command]]


def test_the_shim_counts_and_fails(faulty_server, folder, tmp_path):
    _reset(folder, None)
    calls = _calls(faulty_server, "decide", folder, tmp_path)
    assert {line.split()[1] for line in calls} >= {"mkdir", "write", "fsync", "rename"}
    first = next(number for number, line in enumerate(calls, 1) if line.split()[1] == "fsync")
    _reset(folder, None)
    done = _run(faulty_server, "decide", folder, tmp_path, at=first, error=errno.EIO)
    assert done["code"] == 2 and "Input/output error" in done["stderr"]


PARTS = {"measure": 4, "decide": 1, "merge": 4, "evaluate": 10, "search": 39}  # of about 20 points, chosen by chance


def _cases(*quick: tuple[str, bool]) -> list:
    """Every command in a fresh place and over an earlier result: a few calls of the quick ones in `make test`, all calls of
    all of them, in parts, in slow tests. (A search is gone on with, never done over.)"""
    found = []
    for command, again in [(command, again) for again in (False, True) for command in COMMANDS]:
        name = f"{command} {'again' if again else 'fresh'}"
        if (command, again) in quick:
            found.append(pytest.param(command, again, None, id=f"{name} few"))
        if (command, again) != ("search", True):
            parts = PARTS[command]
            found += [
                pytest.param(command, again, part, id=f"{name} {part + 1} of {parts}", marks=pytest.mark.slow)
                for part in range(parts)
            ]
    return found


@pytest.mark.parametrize(("command", "again", "part"), _cases(("merge", False)))
def test_a_kill_before_any_call_is_mended_by_the_same_line(faulty_server, folder, tmp_path, command, again, part):
    old, expected, points = _prepared(faulty_server, folder, tmp_path, command, again, part)
    for at in points:
        _reset(folder, old)
        killed = _run(faulty_server, command, folder, tmp_path, again, at=at, error=0)
        assert killed["code"] == -9, (at, killed)
        _check_result(folder, command, expected, old, at, killed)
        done = _run(faulty_server, command, folder, tmp_path, again)
        assert done["code"] == 0, (at, done["stderr"])
        assert "Traceback" not in done["stderr"]
        assert _found(folder) == expected, at


@pytest.mark.parametrize(("command", "again", "part"), _cases(("merge", False)))
@pytest.mark.parametrize(
    "error", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)], ids=errno.errorcode.get
)
def test_any_call_that_fails_ends_in_one_true_message(faulty_server, folder, tmp_path, command, again, error, part):
    old, expected, points = _prepared(faulty_server, folder, tmp_path, command, again, part)
    for at in points:
        _reset(folder, old)
        failed = _run(faulty_server, command, folder, tmp_path, again, at=at, error=error)
        assert failed["code"] in (0, 2) and "Traceback" not in failed["stderr"], (at, failed)
        _check_result(folder, command, expected, old, at, failed)
        if failed["code"] == 2 and "[out-not-synced]" not in failed["stderr"]:
            before = (old or BYSTANDER_ENTRIES).keys()
            assert _published(_found(folder), expected) == _published(before, expected), (at, failed)
        done = _run(faulty_server, command, folder, tmp_path, again)
        assert done["code"] == 0, (at, failed["stderr"], done["stderr"])
        assert _found(folder) == expected, at


BYSTANDER_ENTRIES = {name.removeprefix("out/"): text.encode() for name, text in BYSTANDERS.items() if "/" in name}


INTERIM = (
    "/losses",
    "/study.db",
    "search",
    "evaluation",
)  # what evaluator and searcher keep for the next run of the line


def _published(names: Iterable[str], expected: Iterable[str]) -> set[str]:
    """The names that belong to a result, without what is kept to go on from."""
    return {
        name
        for name in {*names} & {*expected}
        if not any(part in f"/{name}" for part in INTERIM[:2]) and name not in INTERIM
    }


def _prepared(
    server: Server, folder: Path, logs: Path, command: str, again: bool, part: int | None
) -> tuple[dict[str, Any] | None, dict[str, Any], list[int]]:
    """What lies there before, what the command makes of it, and the numbers of calls to fail at."""
    _reset(folder, None)
    old = None
    if again:  # with other options, so that everything is made anew
        done = server.run(*_words(command), *OTHER[command], cwd=folder)
        assert done["code"] == 0, done["stderr"]
        old = _raw(folder)
    calls = _calls(server, command, folder, logs, again)
    expected = _found(folder)
    numbers = range(1, len(calls) + 1)
    if part is not None:
        numbers = random.Random(1).sample(numbers, len(numbers))[part :: PARTS[command]]
    else:  # the beginning, the end, and where things take their place
        turning = [number for number in numbers if calls[number - 1].split()[1].startswith("rename")]
        step = max(1, len(calls) // FEW)
        numbers = sorted({*list(numbers)[::step], *turning[:1], *turning[-1:], len(calls)})
    return old, expected, list(numbers)


OTHER = {
    "measure": ("--dtype", "bfloat16"),
    "decide": ("--gamma", "0.3", "--epsilon", "0.8", "--dtype", "float32"),
    "merge": ("--no-write_model_card",),
    "evaluate": ("--random_seed", "1"),
}


def _calls(server: Server, command: str, folder: Path, logs: Path, again: bool = False) -> list[str]:
    (logs / "calls").unlink(missing_ok=True)
    done = _run(server, command, folder, logs, again)
    assert done["code"] == 0, done["stderr"]
    return (logs / "calls").read_text().splitlines()


def _run(server: Server, command: str, folder: Path, logs: Path, again: bool = False, **fault: int) -> dict[str, Any]:
    words = [*_words(command), *(["--overwrite"] if again else [])]
    return server.run(*words, cwd=folder, root=folder / "out", log=logs / "calls", **fault)


def _reset(folder: Path, old: dict[str, Any] | None) -> None:
    """The folder of the results as it was before the command, with the times of its files."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    kept = folder / "kept"
    if old is None:
        shutil.rmtree(kept, ignore_errors=True)
        (folder / "out").mkdir()
        for name, text in BYSTANDERS.items():
            (folder / name).write_text(text)
        return
    shutil.copytree(kept, folder / "out")


def _raw(folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder / "kept", ignore_errors=True)
    shutil.copytree(folder / "out", folder / "kept")
    return _found(folder)


TIMED = {"report.html", "trials.csv"}


def _found(folder: Path) -> dict[str, Any]:
    """Everything in the folder of the results, hidden files included, without the times that some of it holds."""
    paths = sorted((folder / "out").rglob("*"))
    return {path.relative_to(folder / "out").as_posix(): _content(path) if path.is_file() else None for path in paths}


def _content(path: Path) -> Any:
    if path.parent.name.startswith("."):  # a killed run's own folder, where a file may be half written
        return path.read_bytes()
    if path.name == "manifest.json":
        data = json.loads(path.read_bytes())
        for name in TIMED & data.get("files", {}).keys():
            data["files"][name] = data["files"][name] == hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
        return {key: value for key, value in data.items() if key not in ("created", "modified_ns")}
    if path.name == "report.html":  # says how long things took
        return path.read_text().rstrip().endswith("</html>")
    if path.name == "trials.csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    if path.name == "study.db":
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as study:
            return study.execute("pragma integrity_check").fetchall()
    return path.read_bytes()


def _check_result(folder: Path, command: str, expected: dict, old: dict | None, at: int, done: dict) -> None:
    """The bystander's files are as they were; a model is there whole, as it was or as it shall be."""
    for name, text in BYSTANDERS.items():
        assert (folder / name).read_text() == text, (at, done)
    name = Path(RESULTS[command]).name
    if command != "merge" or not (folder / "out" / name).exists():
        assert command != "merge" or old is None, (at, done)
        return
    result = dict(_of(name, _found(folder)))
    assert result in [dict(_of(name, one)) for one in (expected, old or {})], (at, done)


def _of(name: str, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((path, content) for path, content in found.items() if path == name or path.startswith(name + "/"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lewis", "saliency_budget", "sens_merging"])
def test_a_kill_inside_a_model_is_mended_by_the_same_line(faulty_server, folder, tmp_path, method):
    """Passes that write down where they stand at every block."""
    words = [*_words("measure"), "--guidance", method, "--dtype", "float32"]
    more = {"cwd": folder, "root": folder / "out", "log": tmp_path / "calls", "snapshots": 1}
    _reset(folder, None)
    done = faulty_server.run(*words, **more)
    assert done["code"] == 0, done["stderr"]
    expected, calls = _found(folder), (tmp_path / "calls").read_text().splitlines()
    assert any("snapshot" in call for call in calls)
    for at in random.Random(1).sample(range(1, len(calls) + 1), 20):
        _reset(folder, None)
        killed = faulty_server.run(*words, **more, at=at, error=0)
        assert killed["code"] == -9, (at, killed)
        done = faulty_server.run(*words, **more)
        assert done["code"] == 0, (at, calls[at - 1], done["stderr"])
        assert _found(folder) == expected, (at, calls[at - 1])


READ_PARTS = {"measure": 8, "decide": 4, "merge": 8, "evaluate": 16, "search": 40}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "part"),
    [
        pytest.param(command, part, id=f"{command} {part + 1} of {parts}")
        for command, parts in READ_PARTS.items()
        for part in range(parts)
    ],
)
def test_any_read_that_fails_ends_in_a_message(faulty_server, folder, tmp_path, command, part):
    """Of the inputs: models, text, config, tables, recipe."""
    _reset(folder, None)
    (tmp_path / "calls").unlink(missing_ok=True)
    done = faulty_server.run(*_words(command), cwd=folder, root=folder, reads=1, log=tmp_path / "calls")
    assert done["code"] == 0, done["stderr"]
    expected, calls = _found(folder), (tmp_path / "calls").read_text().splitlines()
    for at in random.Random(1).sample(range(1, len(calls) + 1), len(calls))[part :: READ_PARTS[command]]:
        _reset(folder, None)
        failed = faulty_server.run(
            *_words(command), cwd=folder, root=folder, reads=1, at=at, error=errno.EIO, log=tmp_path / "calls"
        )
        assert failed["code"] in (0, 2) and "Traceback" not in failed["stderr"], (at, calls[at - 1], failed)
        found = _found(folder)
        if failed["code"] == 0:
            assert found == expected, (at, calls[at - 1], failed)
        else:
            assert "error: " in failed["stderr"], (at, failed)
            assert _published(found, expected) == _published(BYSTANDER_ENTRIES, expected), (at, calls[at - 1], failed)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["measure", "merge"])
def test_a_kill_at_any_time_is_mended_by_the_same_line(faulty_server, folder, tmp_path, command):
    _reset(folder, None)
    whole = _run(faulty_server, command, folder, tmp_path)
    expected, chance = _found(folder), random.Random(1)
    killed = 0
    for _ in range(60):
        _reset(folder, None)
        first = _run(faulty_server, command, folder, tmp_path, limit=chance.uniform(0, whole["seconds"]))
        killed += first["code"] == -9
        _check_result(folder, command, expected, None, 0, first)
        done = _run(faulty_server, command, folder, tmp_path)
        assert done["code"] == 0, (first, done["stderr"])
        assert _found(folder) == expected
    assert killed > 30
