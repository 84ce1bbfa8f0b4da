"""`parity: reference` reproduces what the released LEWIS code computed (float32): norms, deltas, sample choice."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT

PORTABLE = ROOT / "tests/golden"
DATA = os.environ.get("LEWIS_TEST_DATA")
TOLERANCE = 1e-4

needs_data = pytest.mark.skipif(not DATA, reason="LEWIS_TEST_DATA names no folder with golden/ and data/")


def measure(golden: Path, run: str, rows: Path, workdir: Path, monkeypatch, devices=None, **changes) -> Path:
    """Measure a golden pair from the folder its model names are relative to, in this process."""
    from utils.commands.measure import measure_pair
    from utils.commands.measure_options import MeasureOptions
    from utils.guidance.method import guidance_methods
    from utils.pair.config import read_pair_config

    raw = yaml.safe_load((golden / run / "pair.yaml").read_text())
    raw |= {"dataset": {"name": "gsm8k", "path": str(rows)}, **changes}
    workdir.mkdir(exist_ok=True)
    (workdir / "pair.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    monkeypatch.chdir(golden)
    config = read_pair_config(workdir / "pair.yaml")
    method = guidance_methods()["lewis"]
    options = MeasureOptions(config, method, {}, workdir / "dfs", device="cpu", dtype="float32", devices=devices)
    measure_pair(options)
    return workdir / "dfs"


def assert_equal_norms(golden: Path, run: str, folder: Path) -> None:
    expected = json.loads((golden / run / "norms.json").read_text())
    norms = pd.read_csv(folder / "norms.csv")
    raw = yaml.safe_load((golden / run / "pair.yaml").read_text())
    assert len(norms) == sum(len(table) for table in expected.values())
    for row in norms.itertuples():
        key = f"Layer_{raw['prefix_mapping'][row.component]}_{row.layer}"
        assert row.norm == pytest.approx(expected[row.model][key], rel=TOLERANCE), (row.model, key)
        assert row.tensor == f"model.layers.{row.layer}.{raw['prefix_mapping'][row.component]}.weight"
    for model in set(expected) - {"base"}:
        ours, theirs = (pd.read_csv(place / f"{model}_delta.csv") for place in (folder, golden / run))
        assert list(ours.columns) == list(theirs.columns)
        assert (ours - theirs).abs().to_numpy().max() < 1e-3  # differences of norms that agree to 1e-4


@pytest.mark.parametrize("run", ["sparsity0", "sparsity50"])
def test_norms_equal_the_released_code_on_the_portable_pair(run, tmp_path, monkeypatch):
    folder = measure(PORTABLE, run, PORTABLE / "rows.jsonl", tmp_path, monkeypatch, parity="reference")
    assert_equal_norms(PORTABLE, run, folder)


@needs_data
@pytest.mark.parametrize("run", ["gsm8k_sparsity0", "gsm8k_sparsity50"])
def test_norms_equal_the_released_code_on_gsm8k(run, tmp_path, monkeypatch):
    golden, rows = Path(DATA) / "golden", Path(DATA) / "data" / "gsm8k" / "train.jsonl"
    folder = measure(golden, run, rows, tmp_path, monkeypatch, parity="reference")
    assert_equal_norms(golden, run, folder)


def test_left_padding_tokenizers_keep_their_side_in_parity(tmp_path, monkeypatch):
    """The released code pads on the tokenizer's own side: the very same models must give other numbers then."""
    copy = tmp_path / "golden"
    shutil.copytree(PORTABLE, copy)
    for folder in (copy / "models").iterdir():
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    rows = PORTABLE / "rows.jsonl"
    left = measure(copy, "sparsity0", rows, tmp_path / "left", monkeypatch, parity="reference")
    with pytest.raises(AssertionError):
        assert_equal_norms(PORTABLE, "sparsity0", left)


def test_default_numbers_do_not_depend_on_padding_side_or_batches(tmp_path, monkeypatch):
    rows = PORTABLE / "rows.jsonl"
    one = pd.read_csv(measure(PORTABLE, "sparsity0", rows, tmp_path / "one", monkeypatch) / "norms.csv")
    copy = tmp_path / "golden"
    shutil.copytree(PORTABLE, copy)
    for folder in (copy / "models").iterdir():
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    other = pd.read_csv(measure(copy, "sparsity0", rows, tmp_path / "two", monkeypatch) / "norms.csv")
    assert other["norm"].tolist() == pytest.approx(one["norm"].tolist(), rel=1e-6)


def test_the_plain_published_procedure_gives_the_same_numbers(tmp_path, monkeypatch):
    """The baseline that the benchmarks time computes what it claims to."""
    import torch

    from benchmarks.published_scoring import padded_samples, score

    folder = PORTABLE / "models" / "base"
    samples = padded_samples(str(folder), PORTABLE / "rows.jsonl", 15)
    norms = score(str(folder), samples, torch.float32, "cpu", 0.5)
    expected = json.loads((PORTABLE / "sparsity50" / "norms.json").read_text())["base"]
    assert len(norms) == len(expected)
    for (layer, name), norm in norms.items():
        assert norm == pytest.approx(expected[f"Layer_{name}_{layer}"], rel=TOLERANCE)


def test_models_measured_side_by_side_give_the_same_bytes(tmp_path, monkeypatch):
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = measure(PORTABLE, "sparsity50", PORTABLE / "rows.jsonl", tmp_path / "one", monkeypatch)
        other = measure(
            PORTABLE, "sparsity50", PORTABLE / "rows.jsonl", tmp_path / "two", monkeypatch, devices="cpu,cpu"
        )
    finally:
        torch.set_num_threads(threads)
    for name in ("norms.csv", "math_delta.csv", "code_delta.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
