"""Every way the hub can fail to give a model is told with what to do about it.

python -m pytest tests/models/test_hub.py
"""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from tests.conftest import ROOT
from utils.errors import UserError
from utils.models.hub import download


def answer(kind: type, status: int):
    return kind("the hub's words", response=SimpleNamespace(status_code=status, headers={}, request=None))


def refusal(monkeypatch, error: Exception, revision: str | None = None) -> str:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        download("some/model", revision, ["*.json"])
    assert str(caught.value).startswith("model some/model")
    return str(caught.value)


def test_answers_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    gated = refusal(monkeypatch, answer(errors.GatedRepoError, 403))
    assert "is gated: accept its terms on the hub and run `hf auth login`" in gated
    missing = refusal(monkeypatch, answer(errors.RepositoryNotFoundError, 404))
    assert f"no such folder here (in {tmp_path}) and no such public repository" in missing
    assert "`hf auth login`" in missing
    revision = refusal(monkeypatch, answer(errors.RevisionNotFoundError, 404), "v9")
    assert revision == "model some/model at revision v9: the hub has no such revision"
    assert "nor a valid hub id" in refusal(monkeypatch, errors.HFValidationError("odd name"))


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_is_named_as_the_reason(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    said = refusal(monkeypatch, errors.LocalEntryNotFoundError("no snapshot"))
    assert "not in the local hub cache, and HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize(
    "error",
    [errors.LocalEntryNotFoundError("x"), ConnectionError("x"), TimeoutError("x"), answer(errors.HfHubHTTPError, 500)],
)
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert f"the hub cannot be reached ({type(error).__name__})" in refusal(monkeypatch, error)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_cache_that_cannot_be_written(monkeypatch, code):
    said = refusal(monkeypatch, OSError(code, os.strerror(code), "/cache/x"))
    assert said.endswith(
        f"the hub cache cannot be written: {os.strerror(code)} (/cache/x); set HF_HOME to a folder that can"
    )


def test_a_client_that_cannot_even_start(monkeypatch):
    said = refusal(monkeypatch, ValueError("Unknown scheme for proxy URL 'x://y'\nmore"))
    assert said == "model some/model: the hub cannot be reached: Unknown scheme for proxy URL 'x://y' more"


def test_names_that_are_no_ids_and_ids_that_are_not_cached(tmp_path):
    for name in ("a b/c", "-x/y", "x" * 300, "$HOME/m"):
        with pytest.raises(UserError, match=r"neither a folder here .* nor a valid hub id"):
            download(name, None, ["*.json"])
    with pytest.raises(UserError, match="not in the local hub cache, and HF_HUB_OFFLINE is set"):
        download("nobody/nothing-like-this", "abc", ["*.json"])


REAL = """
from utils.errors import UserError
from utils.models.hub import download
try:
    download("nobody/nothing-like-this", None, ["*.json"])
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ({"HTTPS_PROXY": "nonsense://x"}, "the hub cannot be reached"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/proc/1/nowhere"}, "the hub"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": ""}, "the hub cannot be reached"),
    ],
)
def test_traps_in_the_environment(tmp_path, environment, words):
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
    assert ended.stdout.startswith("model nobody/nothing-like-this: ") and words in ended.stdout
