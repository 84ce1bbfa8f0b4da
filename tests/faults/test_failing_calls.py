"""Let every call of a command that changes a file, or reads an input, fail: one true message, and nothing is lost or half there.

python -m pytest tests/faults/test_failing_calls.py            a few points of a merge
python -m pytest tests/faults/test_failing_calls.py -m slow    all cases of all commands, in parts

Calls of one name for the same file from the same lines of Python are one case, of which a call chosen by chance fails. Part 1
begins with a case of every place in the code.
"""

import errno
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Server
from tests.faults.outcomes import (
    BYSTANDER_ENTRIES,
    beginning,
    by_place,
    call_of,
    calls_of,
    check_result,
    found_in,
    is_one_message,
    noted,
    published,
    run,
    words_of,
)
from tests.faults.trees import digest, look, put

FEW = 3
PARTS = {"measure": 2, "decide": 1, "merge": 2, "evaluate": 3, "search": 6}  # of about 40 cases
READ_PARTS = {"measure": 2, "decide": 1, "merge": 2, "evaluate": 6, "search": 9}  # of about 100


def test_the_shim_counts_and_fails(faulty_server, folder, tmp_path):
    start, _ = beginning(faulty_server, "decide", folder, False)
    done = run(faulty_server, "decide", folder, tmp_path / "calls")
    assert done["code"] == 0, done["stderr"]
    calls = calls_of(tmp_path / "calls")
    assert {line.split()[1] for line in calls} >= {"mkdir", "write", "fsync", "rename"}
    first = next(number for number, line in enumerate(calls, 1) if line.split()[1] == "fsync")
    put(start, folder / "out")
    done = run(faulty_server, "decide", folder, tmp_path / "calls", at=first, error=errno.EIO)
    assert done["code"] == 2 and "Input/output error" in done["stderr"]


def _cases() -> Iterator[Any]:
    """Every command in a fresh place and over an earlier result; a few calls of a merge in `make test`."""
    yield pytest.param("merge", False, errno.ENOSPC, None, id="merge-fresh-ENOSPC-few")
    for command, parts in PARTS.items():
        for again in (False, True) if command != "search" else (False,):
            for error in (errno.ENOSPC, errno.EIO):
                for part in range(parts):
                    name = f"{command}-{'again' if again else 'fresh'}-{errno.errorcode[error]}-{part + 1}-of-{parts}"
                    marks = [pytest.mark.slow, pytest.mark.timeout(2400)]
                    yield pytest.param(command, again, error, part, id=name, marks=marks)


@pytest.mark.parametrize(("command", "again", "error", "part"), _cases())
def test_any_call_that_fails_ends_in_one_true_message(faulty_server, folder, tmp_path, command, again, error, part):
    start, old = beginning(faulty_server, command, folder, again)
    log, stacks = tmp_path / "calls", tmp_path / "stacks"
    done = run(faulty_server, command, folder, log, again, stacks=stacks)
    assert done["code"] == 0, done["stderr"]
    expected, calls = found_in(folder), calls_of(log)
    chosen = _few(calls) if part is None else _part(by_place(calls, stacks), part, PARTS[command])
    mended = {digest(start)}  # trees over which the line has ended well
    wrong: list[str] = []
    for at in chosen:
        put(start, folder / "out")
        failed = run(faulty_server, command, folder, log, again, at=at, error=error)
        with noted(wrong, (calls[at - 1], failed)):
            call_of(log, at)
            check_result(folder, command, expected, old, at)
            _check_ending(failed, found_in(folder), expected, old)
            if (left := digest(look(folder / "out"))) not in mended:
                done = faulty_server.run(*words_of(command, again), cwd=folder)
                assert done["code"] == 0, done["stderr"]
                assert found_in(folder) == expected
                mended.add(left)
    assert not wrong, "\n".join(wrong)
    print(f"{len(chosen)} of {len(calls)} calls, {len(mended)} trees")


def _check_ending(failed: dict[str, Any], found: dict, expected: dict, old: dict | None) -> None:
    """The new result and success, or a message; the earlier result then, unless the message says that the new one is there."""
    assert failed["code"] in (0, 2) and "Traceback" not in failed["stderr"]
    if failed["code"]:
        assert is_one_message(failed["stderr"])
    new = failed["code"] == 0 or "[out-not-synced]" in failed["stderr"]
    before = BYSTANDER_ENTRIES if old is None else old
    hidden = [Path(name) for name in found if any(part.startswith(".") for part in Path(name).parts)]
    above = {parent.as_posix() for path in hidden for parent in path.parents}  # there because of what stays in them
    names = {*expected, *before} - (above - before.keys())
    assert published(found, names) == published(expected if new else before, names)
    places = {next(part for part in path.parts if part.startswith(".")) for path in hidden}
    for place in places - {Path(name).name for name in before}:
        assert place in failed["stderr"], f"nothing is said of {place}"


def _few(calls: list[str]) -> list[int]:
    numbers = range(1, len(calls) + 1)
    turning = [number for number in numbers if calls[number - 1].split()[1].startswith("rename")]
    step = max(1, len(calls) // FEW)  # the beginning, the end, and where things take their place
    return sorted({*list(numbers)[::step], *turning[:1], *turning[-1:], len(calls)})


def _part(cases: list[list[int]], part: int, parts: int) -> list[int]:
    """Of each case of a part one call, chosen by chance."""
    size, chance = -(-len(cases) // parts), random.Random(1)
    numbers = [chance.choice(case) for case in cases][part * size : (part + 1) * size]
    print(f"{len(numbers)} of {len(cases)} cases, which are {sum(map(len, cases))} calls")
    return numbers


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("command", "part"),
    [
        pytest.param(command, part, id=f"{command}-{part + 1}-of-{parts}")
        for command, parts in READ_PARTS.items()
        for part in range(parts)
    ],
)
def test_any_read_that_fails_ends_in_a_message(faulty_server, folder, tmp_path, command, part):
    """Of the inputs: models, text, config, tables, recipe."""
    log, stacks = tmp_path / "calls", tmp_path / "stacks"
    expected = _read_all(faulty_server, folder, log, command, stacks=stacks)
    chosen = _part(by_place(calls_of(log), stacks), part, READ_PARTS[command])
    _fail_reads(faulty_server, folder, tmp_path, command, chosen, expected)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("command", [command for command in READ_PARTS if command != "search"])
def test_any_read_that_fails_in_the_trial_ends_in_a_message(faulty_server, folder, tmp_path, command):
    """The forks that try small files read them, too."""
    expected = _read_all(faulty_server, folder, tmp_path / "calls", command, forks=1)
    last = max(int(call.split()[0]) for call in (tmp_path / "calls").read_text().splitlines())
    _fail_reads(faulty_server, folder, tmp_path, command, range(1, last + 1), expected, forks=1)
    print(f"{last} reads")


def _read_all(server: Server, folder: Path, log: Path, command: str, **more: Any) -> dict[str, Any]:
    """Run a command with the reads of its inputs written to `log`, and give what it makes."""
    beginning(server, command, folder, False)
    done = server.run(*words_of(command), cwd=folder, root=folder, reads=1, log=log, **more)
    assert done["code"] == 0, done["stderr"]
    return found_in(folder)


def _fail_reads(
    server: Server, folder: Path, made: Path, command: str, numbers: Iterable[int], expected: dict, **more: Any
) -> None:
    log, wrong = made / "failing", []
    for at in numbers:
        beginning(server, command, folder, False)
        log.unlink(missing_ok=True)
        words = words_of(command)
        failed = server.run(*words, cwd=folder, root=folder, reads=1, at=at, error=errno.EIO, log=log, **more)
        with noted(wrong, (at, failed)), noted(wrong, (call_of(log, at), failed)):
            _check_ending(failed, found_in(folder), expected, None)
    assert not wrong, "\n".join(wrong)
