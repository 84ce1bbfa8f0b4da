"""Where a merged model may be written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.tiny_pairs import contents
from utils.errors import UserError
from utils.merging.output_folder import COMMAND, check_apart, check_output, check_space, left_over, open_stage


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


def test_a_failure_removes_the_folders_it_made(tmp_path):
    output = check_output(tmp_path / "a" / "b" / "model", overwrite=False)
    with pytest.raises(KeyboardInterrupt), open_stage(output) as stage:
        (stage / "x").write_text("x")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {}
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no"), open_stage(output):
        raise ValueError("no")
    assert contents(tmp_path) == {"a": None}


def test_two_runs_cannot_make_the_same_folder(tmp_path):
    output = check_output(tmp_path / "model", overwrite=False)
    other = check_output(tmp_path / "model.2", overwrite=False)
    with open_stage(output), open_stage(other):
        assert left_over(output) == []
        refused(tmp_path / "model", "written by another run")
        with pytest.raises(UserError, match="written by another run"), open_stage(output):
            pass
        check_output(tmp_path / "mode", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.2"]


def test_what_a_killed_run_left_is_named_and_kept(tmp_path):
    (tmp_path / ".model.ab_cd123.part").mkdir()
    (tmp_path / ".model.mine.part").mkdir()
    output = check_output(tmp_path / "model", overwrite=False)
    assert left_over(output) == [tmp_path / ".model.ab_cd123.part"]
    with open_stage(output) as stage:
        (stage / "x").write_text("x")
    assert (tmp_path / ".model.ab_cd123.part").exists() and (tmp_path / "model" / "x").exists()


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "model").symlink_to("real")
    with open_stage(check_output(tmp_path / "model", overwrite=False)) as stage:
        (stage / "x").write_text("x")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "real" / "x").read_text() == "x"


def test_files_get_the_permissions_of_new_files(tmp_path):
    previous = os.umask(0o027)
    try:
        with open_stage(check_output(tmp_path / "model", overwrite=False)) as stage:
            (stage / "x").write_text("x")
            (stage / "x").chmod(0o600)
    finally:
        os.umask(previous)
    assert (tmp_path / "model" / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
