"""What is removed is gone, or the user is told.

python -m pytest tests/publishing/test_disk.py
"""

import errno
import os
from pathlib import Path

import pytest

from tests.faulty import Failing, full
from tests.tiny_pairs import fill
from utils.publishing.disk import remove_tree, sync_folder, write_through
from utils.publishing.siblings import stage_of, sweep

FILES = {"a": b"1", "sub/b": b"2"}


@pytest.mark.parametrize("call", ["unlink", "rmdir", "open"])
@pytest.mark.parametrize("at", [1, 2])
def test_what_an_error_stops_is_tried_once_more(tmp_path, monkeypatch, capsys, call, at):
    folder = fill(tmp_path / "work", FILES)
    monkeypatch.setattr(os, call, Failing(getattr(os, call), at, full(errno.EIO)))
    assert remove_tree(folder) and not folder.exists()
    assert capsys.readouterr().err == ""


def test_a_warning_names_what_cannot_be_removed(tmp_path, monkeypatch, capsys):
    stage = fill(tmp_path / stage_of(Path("model"), "0123456789ab").name, FILES)
    monkeypatch.setattr(os, "rmdir", Failing(os.rmdir, 1, full(errno.EIO), forever=True))
    assert not remove_tree(stage)
    assert capsys.readouterr().err.startswith(f"warning: {stage} is of no use any more")
    assert sweep(tmp_path / "model") == ""  # says nothing that is not so


def test_a_full_disk_is_said_with_the_file(tmp_path, monkeypatch):
    for path, write in (
        (tmp_path / "a", lambda: write_through(tmp_path / "a", b"x")),
        (tmp_path, lambda: sync_folder(tmp_path)),
    ):
        monkeypatch.setattr(os, "fsync", Failing(os.fsync, 1, full()))
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert caught.value.filename == str(path)
        monkeypatch.undo()


def test_what_is_not_there_is_no_failure(tmp_path, capsys):
    assert remove_tree(tmp_path / "nothing")
    assert capsys.readouterr().err == ""
