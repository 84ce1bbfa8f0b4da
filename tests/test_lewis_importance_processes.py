"""Command 1 in processes of its own: what it imports, and what signals, kills and a bare environment leave.

python -m pytest tests/test_lewis_importance_processes.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.commands_here import run_here
from tests.conftest import ROOT
from tests.measuring_here import SCRIPT, WRITTEN, measure
from tests.refusals import refusal_code
from tests.tiny_pairs import contents, pair_settings


def test_help_and_mistakes_answer_without_the_heavy_libraries(pair, run_command_line):
    models = [{"name": "./base", "type": "base"}, {"name": "./gone", "type": "code"}]
    spoiled = {
        "model.yaml": {"model_info": models},
        "adapter.yaml": {"model_info": [models[0], {"name": "./base+./adapter", "type": "code"}]},
        "text.yaml": {"dataset": {"path": "gone.jsonl"}},
    }
    for name, changes in spoiled.items():
        (pair / name).write_text(yaml.safe_dump({**pair_settings(), **changes}))
    before = contents(pair)
    for arguments, ends in (
        (("--config", "model.yaml", "--out_dir", "out"), "[model-missing]"),
        (("--config", "adapter.yaml", "--out_dir", "out"), "[model-missing]"),
        (("--config", "text.yaml", "--out_dir", "out"), "[text-missing]"),
        (("--help",), ""),
        (("--config", "none.yaml", "--out_dir", "out"), "error: pair config none.yaml does not exist [file-missing]"),
        (("--config", "pair.yaml", "--out_dir", "rows.jsonl"), "[out-is-file]"),
    ):
        command = [sys.executable, "-X", "importtime", str(ROOT / SCRIPT), *arguments]
        ended = subprocess.run(command, cwd=pair, capture_output=True, text=True, timeout=60)
        assert ended.returncode == (2 if ends else 0)
        imported = {
            line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")
        }
        assert not {"torch", "transformers", "pandas", "numpy", "datasets"} & imported
        said = "".join(line for line in ended.stderr.splitlines(True) if not line.startswith("import time"))
        assert said.endswith(f"{ends}\n" if ends else "") and "Traceback" not in said
    assert contents(pair) == before


PLAIN = f"""
import sys, runpy
sys.argv = [{SCRIPT!r}, *sys.argv[1:]]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / SCRIPT)!r}, run_name="__main__")
"""
# Waits inside the first block, so that a signal finds the command at work.
WAITING = f"""
import sys, time, tqdm

def wait(self, *args):
    print("AT WORK", file=sys.stderr, flush=True)
    time.sleep(120)

tqdm.tqdm.update = wait
{PLAIN}"""
# No network: whatever reaches for it fails.
BARE = f"""
import socket

def refuse(*args):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
{PLAIN}"""


def start(pair: Path, code: str, out: str, shell: str = 'exec "$0" -c "$@"', **changes: str | None) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LC_", "LANG"))}
    environment = {key: value for key, value in {**kept, **changes}.items() if value is not None}
    return subprocess.Popen(
        ["bash", "-c", shell, sys.executable, code, "--config", "pair.yaml", "--out_dir", out],
        cwd=pair,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, words: str) -> str:
    seen = ""
    while words not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    return seen


def ended_by(process: subprocess.Popen, name: str) -> str:
    process.send_signal(getattr(signal, name))
    return process.communicate(timeout=60)[1]


def assert_unwound(pair: Path, process: subprocess.Popen, err: str, out: str, signum: int = signal.SIGINT) -> None:
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted; nothing unfinished was left behind")
    assert not (pair / out).exists()


def test_interrupted_killed_crowded_and_bare(pair):
    """Three runs at once, each in a process of its own, because starting one takes seconds."""
    before = contents(pair)
    interrupted = start(pair, WAITING, "interrupted/deep")
    killed = start(pair, WAITING, "killed/deep")
    bare = start(
        pair, BARE, "bare", HOME=None, HF_HOME="/proc/1/nowhere", PYTHONHASHSEED="7",
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    try:
        said = wait_for(interrupted, "AT WORK")
        wait_for(killed, "AT WORK")
        crowded = run_here(SCRIPT, "--config", "pair.yaml", "--out_dir", "interrupted/deep", "--dtype", "float16")
        assert refusal_code(crowded) == "out-in-use"
        assert_unwound(pair, interrupted, said + ended_by(interrupted, "SIGINT"), "interrupted")
        ended_by(killed, "SIGKILL")
        err = bare.communicate(timeout=120)[1]
        assert bare.returncode == 0, err
        assert "Traceback" not in err
        warnings = [line for line in err.splitlines() if "warning" in line.lower()]  # the pair is random
        assert all("does not look like a fine-tune" in line for line in warnings)
    finally:
        for process in (interrupted, killed, bare):
            process.kill()
    assert [path.name for path in (pair / "killed/deep").iterdir()] == [".measuring.part"]
    measure(out="killed/deep")  # nothing is in the way after a kill
    assert {path.name for path in (pair / "killed/deep").iterdir()} == WRITTEN
    ours = {name: (pair / "killed/deep" / name).read_bytes() for name in WRITTEN}
    assert {name: (pair / "bare" / name).read_bytes() for name in WRITTEN} == ours
    now = contents(pair)
    assert {name: now[name] for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_termination_is_an_interrupt(pair, name):
    process = start(pair, WAITING, "out")
    try:
        said = wait_for(process, "AT WORK") + ended_by(process, name)
        assert_unwound(pair, process, said, "out", getattr(signal, name))
    finally:
        process.kill()


@pytest.mark.slow
def test_a_reader_that_goes_away(pair):
    process = start(pair, BARE, "out", '"$0" -c "$@" | head -n 1')
    out, err = process.communicate(timeout=120)
    assert out.startswith("versions: ") and out.count("\n") == 1
    assert "Traceback" not in err and "BrokenPipe" not in err


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.1, 0.3, 0.7, 1.2, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_any_time_leaves_all_or_nothing(pair, name, delay):
    process = start(pair, PLAIN, "out", HF_HUB_OFFLINE="1")
    time.sleep(delay)
    err = ended_by(process, name)
    made = {path.name for path in (pair / "out").iterdir()} if (pair / "out").exists() else set()
    assert made in (set(), WRITTEN)
    # Before the command has begun (the interpreter still starts) the signal has its usual effect.
    assert process.returncode in (0, 128 + getattr(signal, name), -getattr(signal, name), 1)
    if process.returncode >= 128:
        assert "Traceback" not in err
