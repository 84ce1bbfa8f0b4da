"""Measuring and merging on a device that is not the CPU: the same numbers, and no waiting inside the block loop.

What a GPU alone would show otherwise, tensors of two places in one operation and hidden synchronization, shows here on
any machine. See `tests/simulated_device.py`. Where a GPU is there, it is the device.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.tiny_merges import assert_same_tensors, merge_here, recipe, save_models, tensors
from tests.tiny_pairs import CALIBRATION, save_pair, write_config
from tests.tiny_recipes import decide_here
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.merge import merge
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.merging.settings import MergeSettings
from utils.pair.config import read_pair_config

GPU = torch.cuda.is_available()
OWN = [("saliency", "ties"), ("magnitude", "guided_mean")]
STOCK = [
    method for method in ("ties", "breadcrumbs", "dare_ties") if not (GPU and method == "dare_ties")
]  # other draws


def run_on_device(folder: Path, *commands: Sequence[object]) -> list[list[dict]]:
    """Run commands on the device, in a process of their own; returns what made the host wait (of a GPU: nothing), by command."""
    commands = [[str(ROOT / script), *map(str, words)] for script, *words in commands]
    if GPU:
        runs = [([sys.executable, *words, "--device", "cuda"], "") for words in commands]
    else:
        runs = [([sys.executable, "-m", "tests.simulated_device", "seen.json"], json.dumps(commands))]
    beside = os.environ.get("PYTHONPATH", "")
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), beside))), "HF_HUB_OFFLINE": "1"}
    for command, given in runs:
        done = subprocess.run(
            command, input=given, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        assert ("cuda:0" if GPU else "simulated") in done.stdout
    return [[] for _ in commands] if GPU else [one["waits"] for one in json.loads((folder / "seen.json").read_text())]


def assert_same_models(folder: Path, other: Path) -> None:
    """Two merged models have the same bits; of a GPU, the last ones may be rounded otherwise."""
    if not GPU:
        return assert_same_tensors(folder, other)
    one, two = tensors(folder), tensors(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=2**-7, atol=1e-6)


GIVEN = {
    "accept_useless_text": True,
    "tune_steps": 1,
}  # experts of random numbers gain nothing; one step is like the next


def measured_here(method: GuidanceMethod, out: Path) -> None:
    """Measure the pair in the current folder on the CPU, in this process."""
    own = {flag.name: GIVEN.get(flag.name, flag.default) for flag in method.measure_flags}
    measure_pair(MeasureOptions(read_pair_config(Path("pair.yaml")), method, own, out, "cpu", "float32", 64))


def measuring(method: GuidanceMethod, out: str) -> list[str]:
    """The command that does so on the device."""
    own = {flag.name: GIVEN[flag.name] for flag in method.measure_flags if flag.name in GIVEN}
    return [
        "lewis_importance.py", *("--config", "pair.yaml", "--out_dir", out, "--guidance", method.name),
        *("--dtype", "float32", "--micro_batch_tokens", "64"),
        *(word for name, value in own.items() for word in ((f"--{name}",) if value is True else (f"--{name}", str(value)))),
    ]  # fmt: skip


def assert_same_tables(folder: Path, other: Path) -> None:
    """Every CSV holds the same words and, but for rounding in float32, the same numbers."""
    names = sorted(path.name for path in folder.glob("*.csv"))
    assert names and names == sorted(path.name for path in other.glob("*.csv"))
    for name in names:
        one, two = (pd.read_csv(place / name, keep_default_na=False) for place in (folder, other))
        pd.testing.assert_frame_equal(one, two, rtol=1e-2 if GPU else 1e-4, atol=1e-6)


def merging(made: Path | str, out: str) -> list[str]:
    """The command that merges a recipe."""
    return ["utils/merger.py", "--output_path", out, "--merge_config", str(made)]


@pytest.fixture(scope="module")
def on_device(tmp_path_factory) -> tuple[Path, dict[tuple[str, str], list[dict]]]:
    """A pair's folder, and what made the host wait, by command: all of them in one process.

    Every guidance has measured into `there`; merges by our own methods and by mergekit's executor, of other models, are
    in `own_METHOD` and `stock/there_METHOD`, and those of the CPU in `cpu_METHOD` and `stock/here_METHOD`.
    """
    pair = save_pair(tmp_path_factory.mktemp("pair"))
    write_config(pair, {"calibration": CALIBRATION, "nsamples": 2})
    commands = {("measure", name): measuring(method, f"there/{name}") for name, method in guidance_methods().items()}
    with contextlib.chdir(pair):
        measured_here(guidance_methods()["saliency_budget"], Path("here/saliency_budget"))
        for mask, method in OWN:
            (made,) = decide_here(
                "saliency_budget", "here/saliency_budget", mask=mask, merge_method=method, mean_density=0.3
            )
            merge(MergeSettings(Path(f"cpu_{method}"), made, device="cpu", quiet=True))
            commands["own", method] = merging(made, f"own_{method}")
    stock = save_models(pair / "stock")
    for method in STOCK:
        merge_here(stock, recipe(stock, method), f"here_{method}")
        commands["stock", method] = merging(f"stock/here_{method}.yaml", f"stock/there_{method}")
    return pair, dict(zip(commands, run_on_device(pair, *commands.values()), strict=True))


@pytest.mark.parametrize("name", sorted(guidance_methods()))
def test_every_guidance_measures_the_same_as_on_the_cpu(on_device, monkeypatch, name):
    pair, waits = on_device
    monkeypatch.chdir(pair)
    here, there = Path("here") / name, Path("there") / name
    if not here.exists():
        measured_here(guidance_methods()[name], here)
    assert_same_tables(here, there)
    for file in here.glob("*.safetensors"):
        vectors, others = load_file(file), load_file(there / file.name)
        assert vectors.keys() == others.keys()
        for key, vector in vectors.items():
            least = 1e-6 * float(vector.abs().max())  # sums that cancel have the rounding of their terms
            np.testing.assert_allclose(others[key].numpy(), vector.numpy(), rtol=1e-2 if GPU else 1e-4, atol=least)
    # results are fetched once, after the last block; transformers looks once at every padded mask, before the first.
    # Merges of a block at every level are solved and judged on the CPU while that block is there.
    found = waits["measure", name]
    inside = [wait for wait in found if "_through_block" in wait["stack"]]
    assert not [wait for wait in inside if "held_out_misses" not in wait["stack"]]
    assert found or GPU


@pytest.mark.parametrize("method", STOCK)
def test_a_merge_by_mergekits_executor_has_the_bits_of_one_on_the_cpu(on_device, method):
    pair, waits = on_device
    assert_same_models(pair / f"stock/here_{method}", pair / f"stock/there_{method}")
    # selection leaves every number on the device
    assert not [wait for wait in waits["stock", method] if "band_mask" in wait["stack"]]


@pytest.mark.parametrize("method", [method for _, method in OWN])
def test_our_own_merge_methods_have_the_bits_of_a_merge_on_the_cpu(on_device, method):
    pair, _ = on_device
    assert_same_models(pair / f"cpu_{method}", pair / f"own_{method}")
