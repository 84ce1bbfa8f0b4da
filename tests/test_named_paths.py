"""Paths that tokenizers and safetensors cannot open are refused at once.

python -m pytest tests/test_named_paths.py
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.commands_here import refused_here
from tests.conftest import ROOT
from tests.refusals import refused
from utils.models.checkpoints import is_local, local_folder
from utils.named_paths import check_path, without_folders
from utils.pair.rows import data_file


def test_paths_in_utf8_pass(tmp_path):
    for path in ("model", "mod\u00e8les/base", "\U0001f600", tmp_path, "with space", ""):
        check_path(path, "model folder x")


def test_bytes_that_are_not_utf8(tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    with refused("path-not-utf8") as caught:
        check_path(odd, "model folder x")
    assert str(caught.value).isascii()
    (tmp_path / "link").symlink_to(odd)
    monkeypatch.chdir(odd)
    (odd / "base").mkdir()
    (odd / "rows.jsonl").write_text("{}")
    for name in ("./base", str(odd), str(tmp_path / "link")):
        with refused("path-not-utf8"):
            local_folder(name)
    assert data_file("rows.jsonl")  # read by this project alone


SCRIPT = """
from utils.errors import UserError
from utils.named_paths import check_path, without_folders

for path in ("base", "mod\\u00e8les", "mod\\udcc3\\udca8les", "caf\\udce9"):
    try:
        check_path(path, "model folder x")
        print("passed")
    except UserError as error:
        print(error.code)
"""


def test_a_locale_that_cannot_name_the_folder():
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, **locale},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["passed", "path-locale", "path-locale", "path-not-utf8"], done.stderr
    remedied = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, **locale, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert remedied.stdout.split()[:2] == ["passed", "passed"]


def test_no_id_of_the_hub_has_other_letters():
    assert is_local("mod\u00e8les/base") and not is_local("models/base")
    with refused("model-missing"):
        local_folder("mod\u00e8les/base")


RECIPE = "merge_method: linear\nmodels: [{model: ./base, parameters: {weight: 1.0}}]\n"


@pytest.mark.parametrize(
    "words",
    [
        ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "out"),
        ("utils/merger.py", "--merge_config", "recipe.yaml", "--output_path", "out/model"),
    ],
)
def test_the_commands_in_a_folder_of_another_encoding(words, pristine, tmp_path):
    odd = shutil.copytree(pristine, tmp_path / os.fsdecode(b"caf\xe9"))
    (odd / "recipe.yaml").write_text(RECIPE)
    refused_here("path-not-utf8", *words, cwd=odd)


def test_of_an_absolute_path_the_last_part_may_be_published():
    names = {
        "org/model": "org/model",
        "models/a": "models/a",
        "/home/me/a": "a",
        "/a/b/": "b",
        "/a/b/.": "b",
        "~/a": "a",
        "": "",
    }
    assert {name: without_folders(name) for name in names} == names
    assert without_folders("~nobody_of_this_name/a") == "~nobody_of_this_name/a"
