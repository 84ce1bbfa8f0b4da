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
from utils.publishing.exchange import exchange

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


READER = """
import os, sys
place, reads, absent = sys.argv[1], 0, 0
while not os.path.exists(sys.argv[2]):
    for name in ("manifest.json", "config.json"):
        reads += 1
        try:
            with open(os.path.join(place, name), "rb") as file:
                absent += not file.read()
        except FileNotFoundError:
            absent += 1
print(reads, absent)
"""


def test_readers_never_find_a_model_absent(plain_server, folder, tmp_path):
    """20 rounds of replacing a result, while two processes read it all the time."""
    words, place = [*COMMANDS["merge"], "--overwrite"], folder / RESULTS["merge"]
    assert plain_server.run(*words, "--random_seed", 100, cwd=folder)["code"] == 0
    if not _can_exchange(tmp_path):
        pytest.skip("this file system cannot let two folders change places")
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, place, tmp_path / "end"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for seed in range(20):
        done = plain_server.run(*words, "--random_seed", seed, cwd=folder)
        assert done["code"] == 0, done["stderr"]
    (tmp_path / "end").touch()
    counted = [tuple(map(int, reader.communicate(timeout=30)[0].split())) for reader in readers]
    assert sum(reads for reads, _ in counted) > 50_000, counted
    assert [absent for _, absent in counted] == [0, 0], counted


def _can_exchange(folder: Path) -> bool:
    for name in ("one", "two"):
        (folder / name).mkdir()
    return exchange(folder / "one", folder / "two")
