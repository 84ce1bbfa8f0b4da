"""Measuring needs the memory of a block, not of the model: real processes, memory that the system cannot reclaim."""

import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.contenders import Contender, run_once
from benchmarks.shapes import SHAPES, build_pair, rows_files
from tests.conftest import ROOT


def peak(shape: str, folder: Path) -> tuple[int, int]:
    """Peak of anonymous memory while measuring a pair of a shape, and the bytes of one of its models."""
    places = build_pair(shape, folder / shape, None)
    models = [{"name": str(places["base"]), "type": "base"}, {"name": str(places["one"]), "type": "one"}]
    config = {"model_info": models, "dataset": {"name": "gsm8k", "path": str(rows_files(None)["gsm8k"])}}
    (folder / f"{shape}.yaml").write_text(yaml.safe_dump(config))
    command = (
        sys.executable,
        str(ROOT / "lewis_importance.py"),
        *("--config", str(folder / f"{shape}.yaml"), "--out_dir", str(folder / f"dfs_{shape}"), "--device", "cpu"),
    )
    size = sum(file.stat().st_size for file in places["base"].glob("*.safetensors"))
    return run_once(Contender(shape, command, 0)).anonymous, size


@pytest.mark.slow
def test_unreclaimable_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    # Two shapes that differ in depth alone: blocks, embeddings and hidden states are the same size.
    shallow = SHAPES["llama-160m"] | {"num_hidden_layers": 4}
    monkeypatch.setitem(SHAPES, "shallow", shallow)
    monkeypatch.setitem(SHAPES, "deep", shallow | {"num_hidden_layers": 32})
    (small, small_size), (large, large_size) = (peak(shape, tmp_path) for shape in ("shallow", "deep"))
    assert large_size - small_size > 300e6
    assert large - small < 0.25 * (large_size - small_size), (small / 1e6, large / 1e6)
