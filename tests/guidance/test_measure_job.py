"""How pieces of work share devices and threads, and how many models are measured at a time."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.tiny_pairs import save_pair
from utils.commands import measure_preparation
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.measure_request import as_begun
from utils.errors import UserError
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import guidance_methods
from utils.pair.config import read_pair_config
from utils.passes.subjects import Subject
from utils.workers.piece import Piece, Place
from utils.workers.work_folder import folder_name

CPU = torch.device("cpu")
LEWIS = guidance_methods()["lewis"]
SIDE_BY_SIDE = "side by side: {} models at a time"


@pytest.fixture(params=[4])
def threads_of_torch(request):
    """Four threads for torch (or the parameter's number), whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def job(devices: tuple[torch.device, ...] = (CPU,), at_once: int = 1) -> MeasureJob:
    return MeasureJob(None, (), devices, {}, False, at_once)


def works(count: int, meeting: threading.Barrier | None = None) -> list[Piece]:
    """Pieces of work that return their number and torch's threads; with `meeting`, once all have begun."""

    def do(place: Place, number: int) -> tuple[int, int]:
        if meeting:
            meeting.wait(timeout=30)
        return number, torch.get_num_threads()

    return [Piece(str(number), do, (number,), 0) for number in range(count)]


@pytest.mark.parametrize(
    ("devices", "at_once", "count", "threads"),
    [
        ((CPU,), 1, 3, 4),
        ((CPU,), 2, 2, 2),
        ((CPU,), 3, 3, 1),
        ((CPU, CPU), 1, 2, 2),
        ((CPU,) * 4, 1, 2, 2),  # devices that have nothing to do take no threads
        ((CPU,), 3, 1, 4),
    ],
)
def test_works_that_go_side_by_side_share_the_threads(threads_of_torch, devices, at_once, count, threads):
    together = threading.Barrier(count) if threads < 4 else None
    assert job(devices, at_once).run(works(count, together)) == [(number, threads) for number in range(count)]
    assert torch.get_num_threads() == 4


def test_a_piece_that_a_kill_has_left_over_has_no_more_threads_than_beside_the_others(threads_of_torch, tmp_path):
    """The last bits of a sum depend on them."""
    whole = replace(job(at_once=3), workspace=tmp_path).run(works(3))
    shutil.rmtree(tmp_path / "2")
    assert replace(job(at_once=3), workspace=tmp_path).run(works(3)) == whole == [(0, 1), (1, 1), (2, 1)]


WHOLE = Subject(None, None, None, None, torch.float32, {}, experts_apart=False)


def test_threads_are_shared_as_an_interrupted_run_shared_them_whatever_memory_is_free_now(threads_of_torch, tmp_path):
    request = {"guidance_options": {}}
    _, begun = as_begun(tmp_path, replace(job(at_once=3), subjects=(WHOLE,) * 3), None, request)
    (tmp_path / folder_name(begun)).mkdir()
    again, asked = as_begun(tmp_path, replace(job(at_once=1), subjects=(WHOLE,) * 3), None, request)
    assert asked == begun and (again.at_once, again.shares) == (1, 3)
    assert again.run(works(3)) == [(0, 1), (1, 1), (2, 1)]


def test_experts_are_fetched_one_at_a_time_where_an_interrupted_run_did_so(tmp_path):
    apart, request = replace(WHOLE, experts_apart=True), {"guidance_options": {}}
    _, begun = as_begun(tmp_path, replace(job(), subjects=(apart,)), None, request)
    (tmp_path / folder_name(begun)).mkdir()
    assert as_begun(tmp_path, replace(job(), subjects=(WHOLE,)), None, request)[0].subjects == (apart,)


def test_the_threads_come_back_after_an_error(threads_of_torch):
    def fail(place):
        raise UserError("no")

    with pytest.raises(UserError):
        job(at_once=2).run([Piece("bad", fail), *works(1)])
    assert torch.get_num_threads() == 4


def test_one_piece_of_work_is_not_said_to_go_side_by_side(threads_of_torch, capsys):
    job(at_once=3).run(works(1))
    assert "side by side" not in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_in_a_file_has_no_carriage_returns_and_none_is_shown_if_quiet(threads_of_torch, capsys, quiet):
    def advance(place):
        place.on_step(0)

    replace(job(at_once=2), quiet=quiet).run([Piece("base", advance), Piece("code", advance)])
    printed = capsys.readouterr()
    assert "\r" not in printed.err and ("2/2" in printed.err) != quiet
    assert ("side by side" in printed.out) != quiet


def test_no_work_is_no_result():
    assert job(at_once=2).run([]) == []


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A base and two experts, in the current folder."""
    monkeypatch.chdir(save_pair(tmp_path))
    return tmp_path


def measured(out: str, **options) -> Path:
    asked = {"device": "cpu", "dtype": "float32", **options}
    measure_pair(MeasureOptions(read_pair_config(Path("pair.yaml")), LEWIS, {}, Path(out), **asked))
    return Path(out)


def test_on_a_cpu_with_threads_enough_all_models_go_side_by_side(pair, threads_of_torch, capsys):
    three = measured("three")
    assert SIDE_BY_SIDE.format(3) in capsys.readouterr().out
    one = measured("one", devices="cpu")
    assert "side by side" not in capsys.readouterr().out
    frames = [pd.read_csv(folder / "norms.csv") for folder in (three, one)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-5)  # sums depend on the number of threads, in the last digits


@pytest.mark.parametrize("threads_of_torch", [2], indirect=True)
def test_two_threads_take_two_models(pair, threads_of_torch, capsys):
    measured("two")
    assert SIDE_BY_SIDE.format(2) in capsys.readouterr().out


def test_models_that_memory_is_short_for_go_one_by_one(pair, threads_of_torch, monkeypatch, capsys):
    monkeypatch.setattr(measure_preparation, "available_bytes", lambda device: 10**5)
    measured("short")
    assert "side by side" not in capsys.readouterr().out
