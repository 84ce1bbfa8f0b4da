"""Where a merged model may be written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.refusals import refused
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


def assert_refused(path: Path, code: str, words: str = "", *, overwrite: bool = False) -> None:
    with refused(code) as caught:
        check_output(path, overwrite=overwrite)
    assert words in str(caught.value)


def test_new_and_empty_folders_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for path in ("new", "empty", "a/b/c", "./new", "x/../new", "über mich", "n" * 255):
        assert check_output(Path(path), overwrite=False).target == (tmp_path / path).resolve()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "codes"),
    [
        (".", "out-current"),
        ("..", "out-current"),
        ("/", "out-current"),
        ("file", "out-is-file"),
        ("file/model", "out-is-file"),
        ("dangling", "out-broken-link out-unusable"),
        ("n" * 256, "out-name-too-long out-unusable"),
        ("ü" * 200, "out-name-too-long out-unusable"),
        ("model ", "out-name"),
        ("loop/x", "out-unusable out-broken-link"),
        ("nul\0", "out-unusable"),
    ],
)
def test_impossible_places(tmp_path, monkeypatch, path, codes):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    if path == "dangling":
        Path("dangling").symlink_to("loop/nowhere")
    with pytest.raises(UserError) as caught:
        check_output(Path(path), overwrite=False)
    assert caught.value.code in codes.split()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    assert_refused(tmp_path / "model", "out-unwritable")


def test_an_existing_folder_needs_a_writable_parent(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert_refused(tmp_path / "model", "out-unwritable")


def test_only_an_earlier_merge_is_replaced_and_only_when_asked(tmp_path):
    target = published(tmp_path / "model", "config.json", "sub/a")
    assert_refused(target, "out-exists", "give --overwrite")
    assert check_output(target, overwrite=True).replaceable == ("config.json", "manifest.json", "sub/a")
    (target / "sub" / "mine").write_text("x")
    assert_refused(target, "out-foreign-files", "sub/mine is not of the earlier merge", overwrite=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "utils/merger.py"}', "{", '{"files": {"a": 1}}'])
def test_a_folder_without_our_manifest_is_never_replaced(tmp_path, text):
    target = published(tmp_path / "model", "a")
    (target / "manifest.json").write_text(text)
    assert_refused(target, "out-not-ours", "no manifest of an earlier merge", overwrite=True)


def test_the_folder_of_another_command_is_never_replaced(tmp_path):
    target = published(tmp_path / "deltas", "norms.csv", command="lewis_importance.py")
    assert_refused(target, "out-not-ours", "no manifest of an earlier merge", overwrite=True)


def test_inputs_are_kept_apart(tmp_path):
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for path, code in (
        (model / "merged", "out-in-input"),
        (tmp_path / "link" / "merged", "out-in-input"),
        (model, "out-is-input"),
        (tmp_path / "link", "out-is-input"),
        (tmp_path / "models", "out-holds-input"),
    ):
        with refused(code):
            check_apart(path, [("base", model)])
    check_apart(tmp_path / "new", [("base", model)])
    check_apart(tmp_path / "models" / "base2", [("base", model)])


def test_disk_space(tmp_path, monkeypatch):
    output = check_output(tmp_path / "new" / "model", overwrite=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 10**9))
    assert check_space(output, 10**9) == 2 * 10**9
    with refused("disk-full") as caught:
        check_space(output, 3 * 10**9)
    assert "needs 3.00 GB" in str(caught.value) and "has 2.00 GB free" in str(caught.value)


def test_a_folder_that_another_run_is_making(tmp_path):
    with staged_folder(tmp_path / "model"):
        assert_refused(tmp_path / "model", "out-in-use")
        check_output(tmp_path / "mode", overwrite=False)
