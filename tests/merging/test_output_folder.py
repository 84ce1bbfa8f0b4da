"""Where a merged model may be written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.tiny_pairs import contents
from utils.errors import UserError
from utils.merging.output_folder import check_apart, check_output, check_space
from utils.merging.result_files import COMMAND, deviations, file_record, read_result_manifest


def published(folder: Path, *names: str, command: str = COMMAND) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "manifest.json").write_text(json.dumps({"command": command, **file_record(folder)}))
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
        ("/", "out-root"),
        ("file", "out-is-file"),
        ("file/model", "out-is-file"),
        ("dangling", "out-broken-link out-unusable"),
        ("n" * 256, "out-name-too-long out-unusable"),
        ("ü" * 200, "out-name-too-long out-unusable"),
        ("model ", "out-name"),
        ("loop/x", "out-unusable out-broken-link"),
        ("nul\0", "out-name"),
        ("a\nb", "out-name"),
        ("z/" * 2500, "out-unusable"),
        ("caf\udce9", "path-not-utf8"),
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


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "model")
    assert_refused(tmp_path / "model", "out-is-mount")
    assert check_output(tmp_path / "model" / "inside", overwrite=False).target == tmp_path / "model" / "inside"


def test_an_existing_folder_needs_a_writable_parent(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert_refused(tmp_path / "model", "out-unwritable")


def test_only_an_earlier_merge_is_replaced_and_only_when_asked(tmp_path):
    target = published(tmp_path / "model", "config.json", "sub/a")
    assert_refused(target, "out-exists", "give --overwrite")
    assert list(check_output(target, overwrite=True).replaceable) == ["config.json", "manifest.json", "sub/a"]
    (target / "sub" / "mine").write_text("x")
    assert_refused(target, "out-foreign-files", "sub/mine was not written by the merge", overwrite=True)


def test_an_edited_file_or_an_empty_folder_is_named_and_kept(tmp_path):
    target = published(tmp_path / "model", "README.md", "config.json")
    (target / "README.md").write_text("README.mD")
    assert_refused(target, "out-foreign-files", "README.md has other content", overwrite=True)
    (target / "README.md").write_text("longer than before")
    assert_refused(target, "out-foreign-files", "README.md has 18 bytes, recorded were 9", overwrite=True)
    (target / "README.md").write_text("README.md")
    (target / "mine").mkdir()
    assert_refused(target, "out-foreign-files", "mine was not written by the merge", overwrite=True)


def test_a_file_that_a_tampered_manifest_claims_is_kept(tmp_path):
    target = published(tmp_path / "model", "config.json")
    (target / "diary.txt").write_text("mine")
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["diary.txt"] = "0" * 64
    (target / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(target, "out-foreign-files", "diary.txt has other content", overwrite=True)


def test_the_same_recipe_again_is_looked_at_later(tmp_path):
    target = published(tmp_path / "model", "config.json")
    manifest = json.loads((target / "manifest.json").read_text()) | {"recipe": {"sha256": "5"}, "request": "7"}
    (target / "manifest.json").write_text(json.dumps(manifest))
    assert check_output(target, overwrite=False, recipe="5").request == "7"
    with refused("out-exists"):
        check_output(target, overwrite=False, recipe="6")


def test_deviations_are_each_named(tmp_path):
    target = published(tmp_path / "model", "a", "b", "c")
    manifest = read_result_manifest(target)
    assert deviations(target, manifest, every_byte=True) == []
    (target / "a").unlink()
    (target / "b").write_text("B")
    (target / "c").unlink()
    (target / "c").symlink_to("b")
    (target / "d").write_text("d")
    assert [one.text for one in deviations(target, manifest, every_byte=True)] == [
        "a is missing",
        "b has other content",
        "c is not a regular file",
        "d was not written by the merge",
    ]


@pytest.mark.parametrize("name", ["../mine", "/etc/passwd", ".", "sub/../a", "x" * 300, "nul\0", ""])
def test_a_recorded_name_never_leads_out_of_the_folder(tmp_path, name):
    target = published(tmp_path / "model", "a")
    (tmp_path / "mine").write_text("a")
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["a"]  # what is right of the file there
    (found,) = deviations(target, manifest, every_byte=True)
    assert "not the name of a file" in found.text and not found.is_missing


def test_a_file_that_is_missing_keeps_nobody_from_replacing_the_rest(tmp_path):
    target = published(tmp_path / "model", "a", "b")
    (target / "a").unlink()
    assert list(check_output(target, overwrite=True).replaceable) == ["b", "manifest.json"]


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
