"""Measuring and merging on a device that is not the CPU: the same numbers, and no waiting inside the block loop.

What a GPU alone would show otherwise, tensors of two places in one operation and hidden synchronization, shows here on
any machine. See `tests/simulated_device.py`. Where a GPU is there, it is the device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.tiny_merges import assert_same_tensors, merge_here, recipe, save_models, tensors
from tests.tiny_pairs import save_pair, write_config
from tests.tiny_recipes import decide_here
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.merge import merge
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.merging.settings import MergeSettings
from utils.pair.config import PairConfig, read_pair_config

HERE = Path("here")
GPU = torch.cuda.is_available()
CALIBRATION = {
    name: {"path": "rows.jsonl", "text": text, "seqlen": 32}
    for name, text in {"code": "{answer}", "math": "{question} {answer}"}.items()
}


def run_on_device(folder: Path, script: str, *arguments: object) -> list[dict]:
    """Run one of the commands on the device, in a process of its own; returns what made the host wait (of a GPU: nothing)."""
    command = [sys.executable, "-m", "tests.simulated_device", "waits.json", str(ROOT / script), *map(str, arguments)]
    if GPU:
        command = [sys.executable, str(ROOT / script), *map(str, arguments), "--device", "cuda"]
    paths = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ("cuda:0" if GPU else "simulated") in done.stdout
    return [] if GPU else json.loads((folder / "waits.json").read_text())


def assert_same_models(folder: Path, other: Path) -> None:
    """Two merged models have the same bits; of a GPU, the last ones may be rounded otherwise."""
    if not GPU:
        return assert_same_tensors(folder, other)
    one, two = tensors(folder), tensors(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=2**-7, atol=1e-6)


ACCEPTING = {"accept_useless_text": True}  # experts of random numbers gain nothing


def measured_here(method: GuidanceMethod) -> PairConfig:
    """Measure the pair in the current folder on the CPU, in this process; the tables are in `HERE`."""
    config = read_pair_config(Path("pair.yaml"))
    own = {flag.name: flag.default for flag in method.measure_flags}
    own |= {name: value for name, value in ACCEPTING.items() if name in own}
    measure_pair(MeasureOptions(config, method, own, HERE, "cpu", "float32", 64))
    return config


def assert_same_tables(folder: Path, other: Path) -> None:
    """Every CSV holds the same words and, but for rounding in float32, the same numbers."""
    names = sorted(path.name for path in folder.glob("*.csv"))
    assert names and names == sorted(path.name for path in other.glob("*.csv"))
    for name in names:
        one, two = (pd.read_csv(place / name, keep_default_na=False) for place in (folder, other))
        pd.testing.assert_frame_equal(one, two, rtol=1e-2 if GPU else 1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(guidance_methods()))
def test_every_guidance_measures_the_same_as_on_the_cpu(tmp_path, monkeypatch, name):
    pair = save_pair(tmp_path)
    write_config(pair, {"calibration": CALIBRATION})
    waits = run_on_device(
        pair, "lewis_importance.py", *("--config", "pair.yaml", "--out_dir", "there", "--guidance", name),
        *("--dtype", "float32", "--micro_batch_tokens", "64"),
        *(f"--{flag.name}" for flag in guidance_methods()[name].measure_flags if flag.name in ACCEPTING),
    )  # fmt: skip
    monkeypatch.chdir(pair)
    measured_here(guidance_methods()[name])
    assert_same_tables(pair / "here", pair / "there")
    for file in (pair / "here").glob("*.safetensors"):
        vectors, others = load_file(file), load_file(pair / "there" / file.name)
        assert vectors.keys() == others.keys()
        for key, vector in vectors.items():
            least = 1e-6 * float(vector.abs().max())  # sums that cancel have the rounding of their terms
            np.testing.assert_allclose(others[key].numpy(), vector.numpy(), rtol=1e-2 if GPU else 1e-4, atol=least)
    # results are fetched once, after the last block; transformers looks once at every padded mask, before the first.
    # Merges of a block at every level are solved and judged on the CPU while that block is there.
    inside = [wait for wait in waits if "_through_block" in wait["stack"]]
    assert not [wait for wait in inside if "held_out_misses" not in wait["stack"]]
    assert waits or GPU


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_ties"])
def test_a_merge_by_mergekits_executor_has_the_bits_of_one_on_the_cpu(tmp_path, method):
    if GPU and method.startswith("dare"):
        pytest.skip("a GPU draws other numbers than the CPU")
    save_models(tmp_path)
    here = merge_here(tmp_path, recipe(tmp_path, method), "here")
    waits = run_on_device(tmp_path, "utils/merger.py", "--output_path", "there", "--merge_config", "here.yaml")
    assert_same_models(here, tmp_path / "there")
    assert not [wait for wait in waits if "band_mask" in wait["stack"]]  # selection leaves every number on the device


@pytest.mark.parametrize(("mask", "method"), [("saliency", "ties"), ("magnitude", "guided_mean")])
def test_our_own_merge_methods_have_the_bits_of_a_merge_on_the_cpu(tmp_path, monkeypatch, mask, method):
    pair = save_pair(tmp_path)
    write_config(pair, {"calibration": CALIBRATION})
    monkeypatch.chdir(pair)
    measured_here(guidance_methods()["saliency_budget"])
    (made,) = decide_here("saliency_budget", HERE, mask=mask, merge_method=method, mean_density=0.3)
    merge(MergeSettings(Path("cpu"), made, device="cpu", quiet=True))
    run_on_device(pair, "utils/merger.py", "--output_path", "sim", "--merge_config", made)
    assert_same_models(pair / "cpu", pair / "sim")
