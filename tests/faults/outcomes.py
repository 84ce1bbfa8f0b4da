"""What a command has left in the folder of the results, to compare: the bystander's files, a whole model or none, its bytes."""

import contextlib
import csv
import hashlib
import json
import random
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.conftest import Server
from tests.faults.pair import BYSTANDERS, COMMANDS, RESULTS
from tests.faults.trees import Tree, look, put

OTHER = {
    "measure": ("--dtype", "bfloat16"),
    "decide": ("--gamma", "0.3", "--epsilon", "0.8", "--dtype", "float32"),
    "merge": ("--no-write_model_card",),
    "evaluate": ("--random_seed", "1"),
}  # options that make an earlier result, so that everything is made anew. (A search is gone on with, never done over.)
INTERIM = (
    "/losses",
    "/study.db",
    "search",
    "evaluation",
)  # what evaluator and searcher keep for the next run of the line
MEASURED = r"(?:[0-9.]+ (?:h|min|s|GB) ?)+(?=</dd>)|[0-9-]+ [0-9:]+ UTC(?=</dd>)"  # what a run took, and when it was
TIMED = {"report.html", "trials.csv"}
_STACK = "Stack (most recent call first):\n"  # what faulthandler writes before each
BYSTANDER_ENTRIES = {name.removeprefix("out/"): text.encode() for name, text in BYSTANDERS.items() if "/" in name}


@contextlib.contextmanager
def noted(found: list[str], what: object) -> Iterator[None]:
    """What does not hold is noted, so that the other points are tried, too."""
    try:
        yield
    except AssertionError as error:
        found.append(f"{what}: {error}"[:3000])


def words_of(command: str, again: bool = False, out: str | None = None) -> list[str]:
    """The words of a command; `out` stands for the folder of its result, `again` replaces an earlier one."""
    words = [out if out and word == RESULTS[command] else word for word in COMMANDS[command]]
    return [*words, *(["--overwrite"] if again else [])]


def calls_of(log: Path) -> list[str]:
    """The calls that a command has made, in the order of their numbers: `number call file`."""
    calls = log.read_text().splitlines()
    assert [int(call.split()[0]) for call in calls] == list(range(1, len(calls) + 1))
    return calls


def by_place(calls: list[str], stacks: Path) -> list[list[int]]:
    """The numbers of the calls, those of one case together: the same call for the same file from the same lines of Python.

    One case of every place (a call and its lines, for whatever file) comes first, chosen by chance, then a second one of every
    place that has one, and so on.
    """
    places: dict[tuple[str, str], dict[str, list[int]]] = {}
    for call, stack in zip(calls, stacks.read_text().split(_STACK)[1:], strict=True):
        number, name, file = call.split(" ", 2)
        places.setdefault((name, stack), {}).setdefault(plain_name(file), []).append(int(number))
    chance = random.Random(1)
    ranked = [
        (rank, case)
        for of_files in places.values()
        for rank, case in enumerate(chance.sample(list(of_files.values()), len(of_files)))
    ]
    return [case for _, case in sorted(ranked)]


def plain_name(path: str) -> str:
    """A path without the random part of `.NAME.RANDOM.part`, of `.publish.RANDOM.part` and of `losses/tmpRANDOM.part`."""
    return re.sub(r"(/tmp|\.)[a-z0-9_]{8}(?=\.part(?:/|$))", r"\1random", path)


def call_of(log: Path, at: int) -> str:
    """The call of a number, which was made: the fault was met."""
    found = [call for call in log.read_text().splitlines() if int(call.split()[0]) == at]
    assert found, f"no call has the number {at}"
    return found[0]


def is_one_message(text: str) -> bool:
    """Whether a command says one thing that went wrong, ending in its code."""
    return len(re.findall("^error: ", text, flags=re.M)) == 1 and bool(re.search(r"\[[a-z0-9-]+\]\n\Z", text))


def run(server: Server, command: str, folder: Path, log: Path, again: bool = False, **more: Any) -> dict[str, Any]:
    """Run a command with the calls counted that change the results, written to `log` anew."""
    log.unlink(missing_ok=True)
    return server.run(*words_of(command, again), cwd=folder, root=folder / "out", log=log, **more)


def beginning(server: Server, command: str, folder: Path, again: bool) -> tuple[Tree, dict[str, Any] | None]:
    """The folder of the results before a command, as it lies there now; and the earlier result in it, if there is one."""
    put({}, folder / "out")
    for name, text in BYSTANDERS.items():
        (folder / name).write_text(text)
    if again:
        done = server.run(*words_of(command), *OTHER[command], cwd=folder)
        assert done["code"] == 0, done["stderr"]
    return look(folder / "out"), found_in(folder) if again else None


def found_in(folder: Path) -> dict[str, Any]:
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
    if path.name == "report.html":
        return re.sub(MEASURED, "", path.read_text())
    if path.name == "trials.csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    if path.name == "study.db":
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # a copy, in which SQLite undoes half a transaction, which is left as it is
            for file in path.parent.glob("study.db*"):
                shutil.copy(file, folder)
            with contextlib.closing(sqlite3.connect(Path(folder, path.name))) as study:
                return study.execute("pragma integrity_check").fetchall()
    return path.read_bytes()


def check_result(folder: Path, command: str, expected: dict, old: dict | None, what: object) -> None:
    """The bystander's files are as they were; a model is there whole, as it was or as it shall be."""
    for name, text in BYSTANDERS.items():
        assert (folder / name).read_text() == text, what
    name = Path(RESULTS[command]).name
    if command != "merge" or not (folder / "out" / name).exists():
        assert command != "merge" or old is None, what
        return
    result = dict(_of(name, found_in(folder)))
    assert result in [dict(_of(name, one)) for one in (expected, old or {})], what


def _of(name: str, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((path, content) for path, content in found.items() if path == name or path.startswith(name + "/"))


def published(found: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What of a folder of results belongs to one, without what is kept to go on from."""
    names = {*names}
    return {
        name: content
        for name, content in found.items()
        if name in names and not any(part in f"/{name}" for part in INTERIM[:2]) and name not in INTERIM
    }
