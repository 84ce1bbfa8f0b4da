"""What tests of guided merges share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def pair(measured, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A pair of one's own, a copy of the module's `measured` one of that family, as the current folder."""

    def enter(family: str = "llama") -> Path:
        folder = shutil.copytree(measured(family), tmp_path / "pair")
        monkeypatch.chdir(folder)
        return folder

    return enter
