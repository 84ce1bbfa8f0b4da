"""Kill a command before every call that changes a file, and let every such call fail: nothing is lost or half there.

python -m pytest tests/faults/test_system_calls.py            a few points of each command
python -m pytest tests/faults/test_system_calls.py -m slow    all of them
"""

import errno
import json
import random
import shutil
from collections.abc import Iterator
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


def _cases(*quick: tuple[str, bool]) -> list:
    """Every command in a fresh place and over an earlier result: a few calls of the quick ones, all of all in slow tests."""
    found = []
    for every in (False, True):
        for command, again in [(command, again) for again in (False, True) for command in COMMANDS]:
            name = f"{command} {'again' if again else 'fresh'} {'all' if every else 'few'}"
            slow = () if not every and (command, again) in quick else pytest.mark.slow
            found.append(pytest.param(command, again, every, id=name, marks=slow))
    return found


@pytest.mark.parametrize(("command", "again", "every"), _cases(("merge", False)))
def test_a_kill_before_any_call_is_mended_by_the_same_line(faulty_server, folder, tmp_path, command, again, every):
    old, expected, points = _prepared(faulty_server, folder, tmp_path, command, again, every)
    for at in points:
        _reset(folder, old)
        killed = _run(faulty_server, command, folder, tmp_path, again, at=at, error=0)
        assert killed["code"] == -9, (at, killed)
        _check_result(folder, command, expected, old, at, killed)
        done = _run(faulty_server, command, folder, tmp_path, again)
        assert done["code"] == 0, (at, done["stderr"])
        assert "Traceback" not in done["stderr"]
        assert _found(folder) == expected, at


@pytest.mark.parametrize(("command", "again", "every"), _cases(("merge", False)))
@pytest.mark.parametrize(
    "error", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)], ids=errno.errorcode.get
)
def test_any_call_that_fails_ends_in_one_true_message(faulty_server, folder, tmp_path, command, again, error, every):
    old, expected, points = _prepared(faulty_server, folder, tmp_path, command, again, every)
    for at in points:
        _reset(folder, old)
        failed = _run(faulty_server, command, folder, tmp_path, again, at=at, error=error)
        assert failed["code"] in (0, 2) and "Traceback" not in failed["stderr"], (at, failed)
        _check_result(folder, command, expected, old, at, failed)
        if failed["code"] == 2 and "[out-not-synced]" not in failed["stderr"]:
            assert _found(folder).keys() & expected.keys() == (old or BYSTANDER_ENTRIES).keys() & expected.keys(), (
                at,
                failed,
            )
        done = _run(faulty_server, command, folder, tmp_path, again)
        assert done["code"] == 0, (at, failed["stderr"], done["stderr"])
        assert _found(folder) == expected, at


BYSTANDER_ENTRIES = {name.removeprefix("out/"): text.encode() for name, text in BYSTANDERS.items() if "/" in name}


def _prepared(
    server: Server, folder: Path, logs: Path, command: str, again: bool, every: bool
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
    if not every:  # the beginning, the end, and where things take their place
        turning = [number for number in numbers if calls[number - 1].split()[1].startswith("rename")]
        step = max(1, len(calls) // FEW)
        numbers = sorted({*list(numbers)[::step], *turning[:1], *turning[-1:], len(calls)})
    return old, expected, list(numbers)


OTHER = {
    "measure": ("--dtype", "bfloat16"),
    "decide": ("--gamma", "0.3", "--epsilon", "0.8", "--dtype", "float32"),
    "merge": ("--no-write_model_card",),
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


def _found(folder: Path) -> dict[str, Any]:
    """Everything in the folder of the results, hidden files included, without the times that manifests hold."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "out").rglob("*")):
        content: Any = path.read_bytes() if path.is_file() else None
        if path.name == "manifest.json":
            content = {
                key: value for key, value in json.loads(content).items() if key not in ("created", "modified_ns")
            }
        found[path.relative_to(folder / "out").as_posix()] = content
    return found


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
