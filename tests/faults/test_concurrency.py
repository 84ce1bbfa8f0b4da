"""Several commands at once for one place: one works, those that ask for the same wait, others are refused.

python -m pytest tests/faults/test_concurrency.py -m slow
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.pair import COMMANDS, RESULTS, make_pair
from tests.refusals import refusal_code

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair") / "made")


def _start(folder: Path, *words: str) -> subprocess.Popen:
    script, *rest = words
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *rest],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("command", ["measure", "merge"])
def test_five_identical_commands(folder, command):
    started = [_start(folder, *COMMANDS[command]) for _ in range(5)]
    ended = [(*process.communicate(timeout=200), process.returncode) for process in started]
    assert [code for *_, code in ended] == [0] * 5, ended
    assert sum("already holds exactly this" in out for out, *_ in ended) == 4
    assert (folder / RESULTS[command] / "manifest.json").is_file()
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


def test_two_different_merges_of_one_place(folder):
    words = [*COMMANDS["merge"][:-1], "--output_path", "out/two"]
    words = [word for place, word in enumerate(words) if place not in (3, 4)]
    first, second = (_start(folder, *words, "--random_seed", seed) for seed in ("1", "2"))
    ended = []
    for process in (first, second):
        out, err = process.communicate(timeout=200)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    refused = [one for one in ended if one.returncode]
    assert len(refused) >= 1 and all(
        refusal_code(one) in ("out-in-use", "out-exists", "out-foreign-files") for one in refused
    )
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]
