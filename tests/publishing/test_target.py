"""A folder for results is refused before any work, and no two runs write into one.

python -m pytest tests/publishing/test_target.py
"""

import os
from pathlib import Path

import pytest

from tests.faulty import Failing, full
from tests.refusals import refused
from tests.tiny_pairs import contents, fill
from utils.errors import UserError
from utils.publishing.files import publish_files
from utils.publishing.target import locked_folder, prepare_folder, refuse_mount_point

NEW = {"a.csv": b"new a", "manifest.json": b"{}"}


def test_prepare_folder_accepts_and_makes_nothing(tmp_path):
    for folder in (
        tmp_path,
        tmp_path / "new" / "deep",
        tmp_path / "with space",
        tmp_path / "x " / "y",
        tmp_path / "caf\u00e9" / ".." / "x",
    ):
        prepare_folder(folder, "--out_dir")
    assert contents(tmp_path) == {}


def test_prepare_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    before = contents(tmp_path)
    for folder, codes in {
        tmp_path / "file": {"out-is-file"},
        tmp_path / "file" / "below": {"out-is-file"},
        tmp_path / "loop": {"out-broken-link"},
        tmp_path / "broken" / "x": {"out-broken-link"},
        tmp_path / ("n" * 256): {"out-unusable", "out-name-too-long"},
        tmp_path / "new" / ("\u00e9" * 128): {"out-unusable", "out-name-too-long"},
        tmp_path / ("a/" * 3000): {"out-unusable"},
        tmp_path / " x": {"out-name"},
        tmp_path / "x\u00a0": {"out-name"},
        tmp_path / "x\ny" / "z": {"out-name"},
        tmp_path / "\x1b[31m": {"out-name"},
        tmp_path / "caf\udce9" / "x": {"path-not-utf8"},
        Path("/x/.."): {"out-root"},
    }.items():
        with pytest.raises(UserError) as caught:
            prepare_folder(folder, "--out_dir")
        assert caught.value.code in codes and str(caught.value).startswith("--out_dir")
        assert str(caught.value).isprintable()
    assert contents(tmp_path) == before


def test_prepare_folder_refuses_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with refused("out-unwritable") as caught:
        prepare_folder(tmp_path / "x", "--out_dir")
    assert str(caught.value) == f"--out_dir {tmp_path / 'x'}: {tmp_path} is not writable"


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="a list of mount points that Linux has")
def test_mount_points_of_every_kind(tmp_path):
    listed = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert "/proc" in listed
    for place in {one for one in listed if "\\" not in one}:  # with parts of a file system that are mounted elsewhere
        with refused("out-is-mount"):
            refuse_mount_point(Path(place), "--output_path")
    refuse_mount_point(tmp_path, "--output_path")
    refuse_mount_point(tmp_path / "new", "--output_path")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "out"
    with locked_folder(folder):
        with refused("out-in-use"), locked_folder(folder):
            pass
        assert folder.is_dir()  # the refused run took nothing away
        publish_files(folder, NEW, overwrite=False)
    with locked_folder(folder):
        assert contents(folder) == NEW  # no lock file


def test_a_refused_run_that_saw_no_folder_yet_leaves_it_alone(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with locked_folder(folder):
        monkeypatch.setattr(Path, "exists", lambda path: path == tmp_path)  # as it was a moment before the first run
        with refused("out-in-use"), locked_folder(folder):
            pass
        monkeypatch.undo()
        assert folder.is_dir()


def test_a_run_that_fails_leaves_no_empty_folders(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked_folder(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {}
    fill(tmp_path, {"a/other": b"x"})
    with pytest.raises(KeyboardInterrupt), locked_folder(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a": None, "a/other": b"x"}


def test_a_full_disk_for_the_folder_leaves_nothing(tmp_path, monkeypatch):
    failing = Failing(os.mkdir, 3, full())  # the parents are made after the first attempt fails
    monkeypatch.setattr(os, "mkdir", failing)
    with pytest.raises(OSError, match="No space left"), locked_folder(tmp_path / "a" / "b"):
        pass
    assert failing.calls >= 3
    assert contents(tmp_path) == {}
