"""What guidances say they take on a device that is not the CPU, against the bytes of tensors that are there.

python -m pytest -m slow tests/guidance/test_memory.py
"""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.shapes import SHAPES, build_pair, rows_files
from tests.conftest import ROOT
from tests.tiny_pairs import write_config

SHAPE = SHAPES["llama-78m"] | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 8192}
USELESS = "--accept_useless_text"  # random models gain nothing on their text
FLAGS = {"lewis": (), "sens_merging": (USELESS,), "tuned": (USELESS, "--tune_steps", "2")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair whose embeddings and head are most of it."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(SHAPES, "wide", SHAPE)
        models = [{"name": str(place), "type": name} for name, place in build_pair("wide", folder, None).items()]
        text = {"name": "gsm8k", "path": str(rows_files(None)["gsm8k"])}
        write_config(folder, {"model_info": models, "dataset": text, "nsamples": 6})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "dtype"),
    [
        ("lewis", "bfloat16"),
        ("sens_merging", "bfloat16"),
        ("tuned", "bfloat16"),
        ("tuned", "float32"),
    ],
)
def test_what_is_said_is_what_is_on_the_device(pair, tmp_path, guidance, dtype):
    words = ["--config", "pair.yaml", "--out_dir", str(tmp_path / "out"), "--guidance", guidance, "--dtype", dtype]
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_device", str(tmp_path / "seen.json")],
        input=json.dumps([[str(ROOT / "lewis_importance.py"), *words, *FLAGS[guidance]]]),
        cwd=pair,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    (seen,) = json.loads((tmp_path / "seen.json").read_text())
    said = float(re.search(r"memory: about ([\d.]+) MB on sim", done.stdout)[1]) * 1e6
    assert 0.8 < said / seen["most"] < 1.25, (said / 1e6, seen["most"] / 1e6)
