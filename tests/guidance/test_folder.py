"""A dataframe folder's manifest is believed only where it has the form it is written in, and the files are its own.

python -m pytest tests/guidance/test_folder.py
"""

import json
import os

import pytest

from tests.refusals import refused
from utils.guidance.folder import read_manifest, refuse_edited
from utils.publishing.files import publish_files
from utils.publishing.manifest import with_manifest

GOOD = {
    "command": "lewis_importance",
    "guidance": "lewis",
    "options": {"model_info": [{"type": "base", "name": "./base"}]},
    "models": [{"type": "base", "header_sha256": "0"}],
}


@pytest.fixture
def folder(tmp_path):
    publish_files(tmp_path, with_manifest({"a.csv": b"a", "b.csv": b"b"}, GOOD), overwrite=False)
    return tmp_path


def test_what_is_written_is_read(folder):
    manifest = read_manifest(folder)
    assert {key: manifest[key] for key in GOOD} == GOOD and set(manifest["files"]) == {"a.csv", "b.csv"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance": ["lewis"]}, "guidance must be text"),
        ({"command": {}}, "command must be text"),
        ({"files": ["a.csv"]}, "files must be a mapping"),
        ({"files": {"a.csv": ["0"]}}, "files.'a.csv' must be text"),
        ({"models": {"x": 1}}, "models must be a list"),
        ({"models": [{"type": ["base"]}]}, "models[0].type must be text"),
        ({"models": ["base"]}, "models[0] must be a mapping"),
        ({"options": {"model_info": [{"type": [1], "name": "x"}]}}, "options.model_info[0].type must be text"),
        ({"options": {"model_info": [[]]}}, "options.model_info[0] must be a mapping"),
    ],
)
def test_a_manifest_of_another_form(folder, change, words):
    (folder / "manifest.json").write_text(json.dumps({**GOOD, **change}))
    with refused("manifest-wrong-type") as caught:
        read_manifest(folder)
    assert words in str(caught.value)


def test_a_manifest_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with refused("manifest-unreadable"):
        read_manifest(tmp_path)


def test_edited_tables_need_to_be_accepted(folder):
    names, manifest = ("a.csv", "b.csv", "absent.csv"), read_manifest(folder)
    assert refuse_edited(folder, manifest, names, accepted=False) == []
    (folder / "a.csv").write_bytes(b"A")
    with refused("dataframes-edited") as caught:
        refuse_edited(folder, manifest, names, accepted=False)
    assert "--accept_edited" in str(caught.value) and "a.csv" in str(caught.value)
    (warning,) = refuse_edited(folder, manifest, names, accepted=True)
    assert warning.startswith("a.csv differs")
    (folder / "absent.csv").write_bytes(b"left by another measurement")
    with refused("dataframes-edited") as caught:
        refuse_edited(folder, manifest, names[2:], accepted=False)
    assert "does not list absent.csv" in str(caught.value)
    assert refuse_edited(folder, None, names, accepted=False) == []
