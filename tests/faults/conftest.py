"""The warm process that runs command lines, with the calls that change files counted where a compiler is there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


class Server:
    """Runs command lines in forks of one process; see `server.py`."""

    def __init__(self, shim: Path | None) -> None:
        preload = {"LD_PRELOAD": str(shim)} if shim else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **preload}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert json.loads(self.process.stdout.readline())["ready"]

    def run(self, *words: object, cwd: Path, **more: Any) -> dict[str, Any]:
        """Run one command line; `more` are the other keys of a request."""
        more = {key: str(value) if isinstance(value, Path) else value for key, value in more.items()}
        request = {"words": [str(word) for word in words], "cwd": str(cwd), **more}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def plain_server() -> Iterator[Server]:
    """Runs command lines as they are."""
    server = Server(None)
    yield server
    server.close()


@pytest.fixture(scope="session")
def faulty_server(tmp_path_factory) -> Iterator[Server]:
    """Runs command lines that fail or die at a call of choice."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for the shim that makes system calls fail (apt install gcc)")
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"the shim does not compile here: {done.stderr[-200:]}")
    server = Server(shim)
    yield server
    server.close()
