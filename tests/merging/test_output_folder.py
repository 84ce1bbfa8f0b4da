"""Where a merged model may be written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.tiny_pairs import contents
from utils.errors import UserError
from utils.merging.output_folder import COMMAND, check_apart, check_output, check_space
from utils.publish import staged_folder


def published(folder: Path, *names: str, command: str = COMMAND) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "manifest.json").write_text(json.dumps({"command": command, "files": dict.fromkeys(names, 1)}))
    return folder


def refused(path: Path, match: str, *, overwrite: bool = False) -> None:
    with pytest.raises(UserError, match=match):
        check_output(path, overwrite=overwrite)


def test_new_and_empty_folders_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for path in ("new", "empty", "a/b/c", "./new", "x/../new", "über mich", "n" * 255):
        assert check_output(Path(path), overwrite=False).target == (tmp_path / path).resolve()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (".", "current folder"),
        ("..", "current folder or one above"),
        ("/", "current folder or one above"),
        ("file", "is a file"),
        ("file/model", "is a file"),
        ("dangling", "broken symbolic link|is not|cannot be used"),
        ("n" * 256, "longer than 255 bytes|cannot be used"),
        ("ü" * 200, "longer than 255 bytes|cannot be used"),
        ("model ", "white space"),
        ("loop/x", "cannot be used|broken"),
        ("nul\0", "cannot be used"),
    ],
)
def test_impossible_places(tmp_path, monkeypatch, path, match):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    if path == "dangling":
        Path("dangling").symlink_to("loop/nowhere")
    refused(Path(path), match)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    refused(tmp_path / "model", "not writable")


def test_an_existing_folder_needs_a_writable_parent(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    refused(tmp_path / "model", "not writable")


def test_only_an_earlier_merge_is_replaced_and_only_when_asked(tmp_path):
    target = published(tmp_path / "model", "config.json", "sub/a")
    refused(target, "give --overwrite")
    assert check_output(target, overwrite=True).replaceable == ("config.json", "manifest.json", "sub/a")
    (target / "sub" / "mine").write_text("x")
    refused(target, "sub/mine is not of the earlier merge", overwrite=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "utils/merger.py"}', "{", '{"files": {"a": 1}}'])
def test_a_folder_without_our_manifest_is_never_replaced(tmp_path, text):
    target = published(tmp_path / "model", "a")
    (target / "manifest.json").write_text(text)
    refused(target, "no manifest of an earlier merge", overwrite=True)


def test_the_folder_of_another_command_is_never_replaced(tmp_path):
    target = published(tmp_path / "deltas", "norms.csv", command="lewis_importance.py")
    refused(target, "no manifest of an earlier merge", overwrite=True)


def test_inputs_are_kept_apart(tmp_path):
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for path, match in (
        (model / "merged", "lies inside the model base"),
        (tmp_path / "link" / "merged", "lies inside the model base"),
        (model, "is the model base itself"),
        (tmp_path / "link", "is the model base itself"),
        (tmp_path / "models", "holds the model base"),
    ):
        with pytest.raises(UserError, match=match):
            check_apart(path, [("base", model)])
    check_apart(tmp_path / "new", [("base", model)])
    check_apart(tmp_path / "models" / "base2", [("base", model)])


def test_disk_space(tmp_path, monkeypatch):
    output = check_output(tmp_path / "new" / "model", overwrite=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 10**9))
    assert check_space(output, 10**9) == 2 * 10**9
    with pytest.raises(UserError, match=r"needs 3\.00 GB, .* has 2\.00 GB free"):
        check_space(output, 3 * 10**9)


def test_a_folder_that_another_run_is_making(tmp_path):
    with staged_folder(tmp_path / "model"):
        refused(tmp_path / "model", "written by another run")
        check_output(tmp_path / "mode", overwrite=False)
