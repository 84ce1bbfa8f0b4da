"""Pieces on this machine: results that are there are not made again, half-written ones are, and tensors come back as they were."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.faulty import Failing, full
from tests.refusals import refused
from tests.tiny_pairs import contents, fill
from tests.workers.pieces import Doubled, double, doubling, go_on, leave_snapshots, refuse
from utils.publishing.kept import kept_work
from utils.workers.local import LocalWorkers
from utils.workers.piece import Piece
from utils.workers.results import Keeping, KeptResult, find_result
from utils.workers.work_folder import folder_name, work_folder

CPU = torch.device("cpu")


def done(log: Path) -> list[int]:
    """The numbers of the pieces that were done, in order of their numbers."""
    return sorted(int(line.split()[0]) for line in log.read_text().splitlines()) if log.exists() else []


@pytest.mark.parametrize("workers", [LocalWorkers((CPU,)), LocalWorkers((CPU, CPU)), LocalWorkers((CPU,), 3)])
def test_results_come_in_the_order_of_the_pieces_and_are_not_made_twice(tmp_path, workers):
    log, folder, steps = tmp_path / "log", tmp_path / "work", []
    folder.mkdir()
    pieces = doubling(4, log)
    first = workers.run(pieces[:2], folder, lambda label, count: steps.append(count))
    again = workers.run(pieces, folder, lambda label, count: steps.append(count))
    assert [one.twice for one in again] == [0, 2, 4, 6]
    assert done(log) == [0, 1, 2, 3]
    assert sum(steps) == 6
    assert torch.equal(first[1].zeros, again[1].zeros) and again[1].zeros.dtype == torch.float32
    assert (folder / "piece3" / "words.txt").read_text() == "xxx"
    assert sorted(path.name for path in folder.iterdir()) == [f"piece{number}" for number in range(4)]


def test_without_a_folder_nothing_is_kept(tmp_path):
    pieces = doubling(2, tmp_path / "log")
    for _ in range(2):
        assert [one.twice for one in LocalWorkers((CPU,)).run(pieces, None, lambda label, steps: None)] == [0, 2]
    assert done(tmp_path / "log") == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "result.pt").write_bytes((place / "result.pt").read_bytes()[:50]),
        lambda place: (place / "result.pt").write_bytes(b""),
        lambda place: (place / "result.pt").unlink(),
        lambda place: (place / "words.txt").unlink(),
    ],
)
def test_a_damaged_result_is_made_again(tmp_path, damage):
    (piece,) = pieces = doubling(2, tmp_path / "log")[1:]
    run = lambda: LocalWorkers((CPU,)).run(pieces, tmp_path, lambda label, steps: None)  # noqa: E731
    run()
    damage(tmp_path / "piece1")
    assert find_result(tmp_path, piece) is None
    assert run()[0].twice == 2
    assert done(tmp_path / "log") == [1, 1]
    assert find_result(tmp_path, piece).value.number == 1


def test_a_snapshot_is_there_until_the_result_is_kept(tmp_path, monkeypatch):
    """With what lies beside it; another piece's stays, and so does its result, whose name begins alike."""
    pieces = [Piece("piece", leave_snapshots), Piece("piece.5", leave_snapshots)]
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        keep = Failing(Keeping.keep, 2, full())
        patched.setattr(Keeping, "keep", lambda keeping, value: keep(keeping, value))
        LocalWorkers((CPU,)).run(pieces[::-1], tmp_path, lambda label, steps: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piece.5", "piece.snapshot", "piece.sums"]
    LocalWorkers((CPU,)).run(pieces[:1], tmp_path, lambda label, steps: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piece", "piece.5"]


@pytest.mark.parametrize(
    ("state", "value"), [({"key": "half way"}, "half way"), ({"other": 1}, "begun"), ([], "begun")]
)
@pytest.mark.parametrize("before", ["", "next"])
def test_a_snapshot_that_is_no_state_of_its_piece_is_thrown_away_and_said(tmp_path, capsys, state, value, before):
    (tmp_path / f"{before or 'piece'}.snapshot").write_text(json.dumps(state))
    (tmp_path / f"{before or 'piece'}.sums").write_text("half way")
    (tmp_path / "piece.5.snapshot").write_text("another's")
    piece = Piece("piece", go_on, ("key",), before=before)
    assert LocalWorkers((CPU,)).run([piece], tmp_path, lambda label, steps: None) == [value]
    assert capsys.readouterr().err.count("it is made again from its beginning") == (value == "begun")
    left = {"next.snapshot", "next.sums"} if before and value != "begun" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"piece", "piece.5.snapshot", *left}


def test_what_goes_wrong_without_a_snapshot_is_not_tried_again(tmp_path):
    (tmp_path / "piece.sums").write_text("half way")
    with pytest.raises(ValueError, match="without it"):
        LocalWorkers((CPU,)).run([Piece("piece", go_on, ("key",))], tmp_path, lambda label, steps: None)


def test_a_result_runs_no_code_when_it_is_read(tmp_path):
    (piece,) = pieces = doubling(2, tmp_path / "log")[1:]
    LocalWorkers((CPU,)).run(pieces, tmp_path, lambda label, steps: None)
    assert find_result(tmp_path, Piece("piece1", double)) is None  # of a class that was not named
    assert KeptResult(tmp_path, "piece1", (Doubled,)).read().number == piece.arguments[0]
    with pytest.raises(FileNotFoundError):
        KeptResult(tmp_path, "piece1").read()


def test_what_was_done_before_an_error_is_kept_and_nothing_half_written(tmp_path):
    pieces = [*doubling(2, tmp_path / "log"), Piece("bad", refuse, ("no",))]
    (tmp_path / "work").mkdir()
    with refused("test-refused"):
        LocalWorkers((CPU,)).run(pieces, tmp_path / "work", lambda label, steps: None)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["piece0", "piece1"]


def test_a_work_folder_is_the_requests_own_and_goes_once_all_is_done(tmp_path):
    parent, request = tmp_path / ".work", {"rows": [1, 2], "dtype": "float32"}
    pieces = doubling(1, tmp_path / "log")
    with pytest.raises(KeyboardInterrupt), work_folder(parent, request, keep=True) as folder:
        LocalWorkers((CPU,)).run(pieces, folder, lambda label, steps: None)
        (folder / ".piece.x.part").mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["piece0"]
    with work_folder(parent, dict(reversed(request.items())), keep=True) as again:
        assert again == folder and find_result(again, pieces[0]).value.number == 0
    assert not parent.exists()


def flip_last(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def to_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: flip_last(place / "words.txt"),
        lambda place: flip_last(place / "result.pt"),
        lambda place: torch.save({"value": 3, "files": []}, place / "result.pt"),  # what is no such piece's result
        lambda place: (place / "sums.json").unlink(),
        lambda place: (place / "sums.json").write_text("{}"),
        lambda place: to_pipe(place / "words.txt"),
        lambda place: (place / "words.txt").unlink(),
    ],
)
def test_results_that_are_not_as_they_were_left_are_made_again(tmp_path, capsys, damage):
    pieces = doubling(3, tmp_path / "log")
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / ".work", {}, keep=True) as folder:
        LocalWorkers((CPU,)).run(pieces, folder, lambda label, steps: None)
        raise KeyboardInterrupt
    damage(folder / "piece2")
    with work_folder(tmp_path / ".work", {}, keep=True) as folder:
        again = LocalWorkers((CPU,)).run(pieces, folder, lambda label, steps: None)
    assert [one.twice for one in again] == [0, 2, 4] and done(tmp_path / "log") == [0, 1, 2, 2]
    assert capsys.readouterr().err.endswith("finished work that is not as it was left is made again: piece2\n")


def test_a_work_folder_of_another_request_is_begun_anew(tmp_path):
    parent = tmp_path / ".work"
    with pytest.raises(KeyboardInterrupt), work_folder(parent, {"rows": 1}, keep=True) as folder:
        (folder / "piece").mkdir()
        raise KeyboardInterrupt
    with work_folder(parent, {"rows": 2}, keep=True) as other:
        assert [path.name for path in parent.iterdir()] == [other.name] != [folder_name({"rows": 1})]


@pytest.mark.parametrize("at", ["", "mine", folder_name({"rows": 1})])
def test_a_link_where_work_is_done_is_refused(tmp_path, at):
    """What is removed there would be somebody's files."""
    fill(tmp_path, {"scratch/other/data.txt": b"mine"})
    (tmp_path / ".work" / at).parent.mkdir(exist_ok=True)
    (tmp_path / ".work" / at).symlink_to(tmp_path / "scratch")
    before = contents(tmp_path)
    with refused("out-in-the-way"), work_folder(tmp_path / ".work", {"rows": 1}, keep=True):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_not_named_like_results_stays(tmp_path, capsys, keep):
    parent = tmp_path / ".work"
    fill(parent, {"other/data.txt": b"mine", f"{folder_name({'rows': 2})}/result": b"ours"})
    with work_folder(parent, {"rows": 1}, keep=keep):
        pass
    assert contents(parent) == {"other": None, "other/data.txt": b"mine"}
    assert f"{parent} holds other" in capsys.readouterr().err


def test_a_work_folder_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "mkdir", Failing(os.mkdir, 3, full()))  # the folder itself, its parent, the folder again
    with pytest.raises(OSError, match="No space"), work_folder(tmp_path / ".work", {}, keep=True):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "more", "stays"),
    [
        (["piece/result.pt"], {}, ["piece"]),
        (["piece.snapshot", "piece.sums", "piece.writing", "other.sums"], {}, ["piece.snapshot", "piece.sums"]),
        (["piece.forward", "piece.sums"], {}, ["piece.forward"]),
        (["piece/result.pt"], {"keep": False}, []),
        (["piece/result.pt"], {"is_of_use": lambda: False}, []),
        (["piece.sums", "piece.writing", ".piece.x.part/result.pt"], {}, []),
        ([], {}, []),
    ],
)
def test_an_error_leaves_what_is_finished_and_can_be_gone_on_with(tmp_path, left, more, stays):
    with (
        pytest.raises(ValueError, match="no") as caught,
        work_folder(tmp_path / ".work", {}, **{"keep": True, **more}) as folder,
    ):
        fill(folder, dict.fromkeys(left, b"some"))
        raise ValueError("no")
    assert sorted(path.name for path in folder.glob("*")) == stays
    assert (kept_work(caught.value) is not None) == bool(stays) == (tmp_path / ".work").exists()
