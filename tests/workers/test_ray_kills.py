"""Processes of a cluster killed in the middle: a task's, the command's own, a machine's. The same line comes to the same bytes.

python -m pytest tests/workers/test_ray_kills.py -m slow
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.conftest import ROOT
from tests.tiny_pairs import CALIBRATION, contents, save_pair, write_config
from tests.workers.clusters import add_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT = 300.0  # seconds, for what must come to an end by itself on a busy machine
TASK = b"ray::do_piece"  # what Ray calls the processes that are at work on one
WORDS = ("--config", "pair.yaml", "--micro_batch_tokens", "32", "--dtype", "float32", "--quiet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines with a CPU each, which this process does not join; the first is the head. They begin in this folder, and
    the commands in another one."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        patch.setenv("RAY_worker_niceness", "0")  # else tasks wait for whatever else runs on this machine
        made = Cluster()
        try:
            for _ in range(2):
                add_node(made, 1)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair whose text makes three tasks for each model and text, and what command 1 writes without a cluster."""
    folder = save_pair(tmp_path_factory.mktemp("pair"))
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(folder, {"nsamples": 24, "calibration": CALIBRATION})
    ended(start(folder, "here", "--device", "cpu"))
    return folder


def start(folder: Path, out: str, *where: str) -> subprocess.Popen:
    """Command 1 in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "lewis_importance.py"), *WORDS, "--out_dir", out, *where],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(running: subprocess.Popen) -> None:
    """Wait for a command that ends well."""
    said, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == 0, said


def wait_for(found: Callable[[], Any], running: subprocess.Popen | None = None) -> Any:
    """What `found` gives once it is something; the command may not end before."""
    until = time.monotonic() + LIMIT
    while not (one := found()):
        assert time.monotonic() < until
        assert running is None or running.poll() is None, running.communicate()[0]
        time.sleep(0.02)
    return one


def tasks() -> list[int]:
    """The processes that are at work on a task."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(TASK):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            pass
    return found


def at_work(pair: Path, out: str, cluster: Any) -> subprocess.Popen:
    """Command 1 on the cluster, some tasks done and one begun."""
    running = start(pair, out, "--ray", cluster.address)
    wait_for(lambda: list((pair / out).glob(".measuring.part/*/*/result.pt")), running)
    wait_for(tasks, running)
    return running


def test_a_task_whose_process_is_killed_is_done_again(pair, cluster):
    running = at_work(pair, "task", cluster)
    os.kill(tasks()[0], signal.SIGKILL)
    ended(running)
    assert contents(pair / "task") == contents(pair / "here")


def test_a_command_that_is_killed_publishes_nothing_and_goes_on(pair, cluster):
    running = at_work(pair, "command", cluster)
    running.kill()
    running.communicate()
    assert [path.name for path in (pair / "command").iterdir()] == [".measuring.part"]
    wait_for(lambda: not tasks())  # they end with it
    ended(start(pair, "command", "--ray", cluster.address))
    assert contents(pair / "command") == contents(pair / "here")


def test_a_machine_whose_processes_are_killed_costs_its_running_tasks(pair, cluster):
    running = at_work(pair, "machine", cluster)
    (machine,) = cluster.worker_nodes
    os.kill(machine.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    ended(running)
    assert contents(pair / "machine") == contents(pair / "here")
