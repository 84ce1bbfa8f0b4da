"""Fixtures that several test files share. No test reaches the network."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("tests", deadline=None, max_examples=50)  # a busy machine is not a failure
hypothesis.settings.load_profile("tests")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """What the released code computed for a tiny Llama and two fine-tunes; model paths are relative to this folder."""
    return ROOT / "tests" / "golden"


@pytest.fixture
def work(tmp_path, golden, monkeypatch) -> Path:
    """A copy of one golden setting to spoil, in a folder from which the config's model paths are right."""
    shutil.copytree(golden / "sparsity50", tmp_path / "dfs")
    for recipe in (tmp_path / "dfs").glob("*_merge_config.yaml"):
        recipe.unlink()
    shutil.move(tmp_path / "dfs" / "pair.yaml", tmp_path / "pair.yaml")
    (tmp_path / "models").symlink_to(golden / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real texts and further golden files; skips where it is not set."""
    folder = os.environ.get("LEWIS_TEST_DATA")
    if not folder:
        pytest.skip("LEWIS_TEST_DATA is not set: it names a folder with data/ and golden/ of real text")
    return Path(folder)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> Path:
    """Four tiny Llamas with equal tokenizers, of whose changes no two are of one magnitude; read only."""
    from tests.tiny_merges import save_models

    return save_models(tmp_path_factory.mktemp("llamas"), names=("base", "code", "math", "law"))


@pytest.fixture
def copies(llamas, tmp_path) -> Path:
    """A folder of the test's own with copies of them."""
    return shutil.copytree(llamas, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A tiny pair of models with text and config; read only."""
    from tests.tiny_pairs import save_pair

    return save_pair(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def pair(pristine, tmp_path, monkeypatch) -> Path:
    """A copy of it of the test's own, as the current folder."""
    folder = shutil.copytree(pristine, tmp_path / "pair")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Reading a weight for a merge fails the test."""
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

    def forbidden(*_arguments, **_keywords):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", forbidden)
    monkeypatch.setattr("safetensors.torch.load_file", forbidden)


@pytest.fixture
def unread(monkeypatch) -> None:
    """Reading weights to run a model with fails the test."""

    def read_weights(*_arguments, **_keywords):
        raise AssertionError("weights were read")

    monkeypatch.setattr("utils.models.weight_source.StreamedWeights.fetch", read_weights)


@pytest.fixture
def run_command_line() -> Callable[..., subprocess.CompletedProcess]:
    """Run one of the commands as a user does: `run("lewis_merge.py", "--gamma", "0.3", ..., cwd=folder)`."""

    def run(script: str, *arguments: object, cwd: Path = ROOT, timeout: float = 300, **environment: str):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
