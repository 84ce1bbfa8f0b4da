"""Every way the hub can fail to give a model is told with what to do about it.

python -m pytest tests/models/test_hub.py
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from tests.conftest import ROOT
from tests.refusals import refused
from tests.tiny_checkpoints import resave, save_tiny
from utils.models.headers import INDEX
from utils.models.hub import download
from utils.models.opening import open_checkpoint


def answer(kind: type, status: int):
    return kind("the hub's words", response=SimpleNamespace(status_code=status, headers={}, request=None))


def refusal(monkeypatch, code: str, error: Exception, revision: str | None = None) -> str:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with refused(code) as caught:
        download("some/model", revision, ["*.json"])
    assert str(caught.value).startswith("model some/model")
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_answers_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    gated = refusal(monkeypatch, "hub-gated", answer(errors.GatedRepoError, 403))
    assert "is gated: accept its terms on the hub and run `hf auth login`" in gated
    missing = refusal(monkeypatch, "hub-no-repository", answer(errors.RepositoryNotFoundError, 404))
    assert f"no such folder here (in {tmp_path}) and no such public repository" in missing
    assert "`hf auth login`" in missing
    revision = refusal(monkeypatch, "hub-no-revision", answer(errors.RevisionNotFoundError, 404), "v9")
    assert revision == "model some/model at revision v9: the hub has no such revision"
    assert "nor a valid hub id" in refusal(monkeypatch, "hub-bad-name", errors.HFValidationError("odd name"))


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_is_named_as_the_reason(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    said = refusal(monkeypatch, "hub-offline", errors.LocalEntryNotFoundError("no snapshot"))
    assert "not in the local hub cache, and HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize(
    "error",
    [errors.LocalEntryNotFoundError("x"), ConnectionError("x"), TimeoutError("x"), answer(errors.HfHubHTTPError, 500)],
)
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert f"the hub cannot be reached ({type(error).__name__})" in refusal(monkeypatch, "hub-unreachable", error)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_cache_that_cannot_be_written(monkeypatch, code):
    said = refusal(monkeypatch, "hub-cache-unwritable", OSError(code, os.strerror(code), "/cache/x"))
    assert said.endswith(
        f"the hub cache cannot be written: {os.strerror(code)} (/cache/x); set HF_HOME to a folder that can"
    )


def test_a_client_that_cannot_even_start(monkeypatch):
    said = refusal(monkeypatch, "hub-unreachable", ValueError("Unknown scheme for proxy URL 'x://y'\nmore"))
    assert said == "model some/model: the hub cannot be reached: Unknown scheme for proxy URL 'x://y' more"


def test_names_that_are_no_ids_and_ids_that_are_not_cached(tmp_path):
    for name in ("a b/c", "-x/y", "x" * 300, "$HOME/m"):
        with refused("hub-bad-name"):
            download(name, None, ["*.json"])
    with refused("hub-offline"):
        download("nobody/nothing-like-this", "abc", ["*.json"])


REAL = """
from utils.errors import UserError
from utils.models.hub import download
try:
    download("nobody/nothing-like-this", None, ["*.json"])
except UserError as error:
    print(error.code)
"""


@pytest.mark.parametrize(
    ("environment", "codes"),
    [
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, {"hub-unreachable"}),
        ({"HTTPS_PROXY": "nonsense://x"}, {"hub-unreachable"}),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"hub-unreachable"}),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/proc/1/nowhere"},
            {"hub-unreachable", "hub-cache-unwritable"},
        ),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": ""}, {"hub-unreachable"}),
    ],
)
def test_traps_in_the_environment(tmp_path, environment, codes):
    """The real client, pointed at a closed port of this machine, so that nothing leaves it."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().startswith(("hf_", "http"))}
    ended = subprocess.run(
        [sys.executable, "-c", REAL],
        cwd=ROOT,
        env={**kept, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() in codes


class Hub:
    """A hub repository in a folder: fetches into a cache what the patterns of a call match, as the real client does."""

    def __init__(self, files: dict[str, bytes], cache: Path) -> None:
        self.files, self.cache = files, cache / "snapshots" / "abc123"

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False):
        for file in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / file).write_bytes(self.files[file])
        return str(self.cache)

    def fetched(self) -> set[str]:
        return {path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sharded", [True, False])
def test_only_the_weights_that_a_model_is_loaded_from_are_fetched(tmp_path, monkeypatch, sharded):
    """Repositories often hold the same weights again, in another format or folder."""
    folder = save_tiny("llama", tmp_path / "made")
    if sharded:
        resave(folder, "20KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    wanted = set(files)
    more = ("consolidated.safetensors", "original/model.safetensors", "fp16/model-00001-of-00002.safetensors", "m.bin")
    hub = Hub({**files, **dict.fromkeys(more, b"gigabytes")}, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    opened = open_checkpoint("some/model")
    assert hub.fetched() == wanted
    assert opened.tensors.keys() == open_checkpoint(str(folder)).tensors.keys()
    assert (len(opened.files) > 1) == sharded


def test_an_index_that_leads_out_of_the_folder_fetches_nothing_more(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "made")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = files.pop("model.safetensors")
    index = json.dumps({"weight_map": {"a": "../model.safetensors"}}).encode()
    hub = Hub({**files, INDEX: index, "model.safetensors": weights}, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with refused("model-index-outside"):
        open_checkpoint("some/model")
    assert hub.fetched() == {*files, INDEX}
