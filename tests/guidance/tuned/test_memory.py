"""What tuning says it takes on a device, against the bytes of tensors that are there.

python -m pytest tests/guidance/tuned/test_memory.py
"""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import SHAPES, build_pair, rows_files
from tests.conftest import ROOT
from tests.tiny_pairs import write_config
from tests.tiny_recipes import decide_here, measure_here
from utils.guidance.tuned.start import Start
from utils.guidance.tuned.tuning import settings_of
from utils.recipes.method_rules import GRAM_MEAN, TASK_ARITHMETIC

SHAPE = SHAPES["llama-78m"] | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 8192}


@pytest.mark.parametrize(("method", "device"), [(TASK_ARITHMETIC, "cpu"), (GRAM_MEAN, "cuda:0")])
def test_plain_changes_are_merged_where_their_files_are(method, device):
    start = Start(method.name, {}, {"code": 0.5}, {})
    assert settings_of(SimpleNamespace(trust_remote_code=False), torch.device("cuda", 0), start).device == device


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair whose embeddings and head are most of it, and a recipe by gram_mean to start from."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(SHAPES, "wide", SHAPE)
        models = [{"name": str(place), "type": name} for name, place in build_pair("wide", folder, None).items()]
        text = {"name": "gsm8k", "path": str(rows_files(None)["gsm8k"])}
        write_config(folder, {"model_info": models, "dataset": text, "nsamples": 6})
        measure_here("gram_mean", "grams", accept_useless_text=True)
        decide_here("gram_mean", "grams", "start")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("start", ["plain", "gram_mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_said_is_what_is_on_the_device(pair, start, dtype):
    out = f"{start}_{dtype}"
    words = ["--config", "pair.yaml", "--out_dir", out, "--guidance", "tuned", "--accept_useless_text"]
    words += ["--tune_steps", "2", "--dtype", dtype]
    words += ["--start_recipe", str(next(pair.glob("start/*.yaml")))] if start != "plain" else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_device", f"{out}.json"],
        input=json.dumps([[str(ROOT / "lewis_importance.py"), *words]]),
        cwd=pair,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (seen,) = json.loads((pair / f"{out}.json").read_text())
    said = float(re.search(r"memory: about ([\d.]+) MB on sim", done.stdout)[1]) * 1e6
    assert 0.8 < said / seen["most"] < 1.25, (said / 1e6, seen["most"] / 1e6)
