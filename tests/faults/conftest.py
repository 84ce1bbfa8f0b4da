"""The warm process that runs command lines, with the calls that change files counted where a compiler is there."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

_END = b"."
_WATCHED_SECONDS = 1800  # for a command that stands still while it is looked at


class Server:
    """Runs command lines in forks of one process; see `server.py`."""

    def __init__(self, shim: Path | None) -> None:
        preload = {"LD_PRELOAD": str(shim)} if shim else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **preload}
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        assert self._answer()["ready"]

    def run(self, *words: object, cwd: Path, watch: Callable[[int], None] | None = None, **more: Any) -> dict[str, Any]:
        """Run one command line; `more` are the other keys of a request.

        `watch` is called with the number of each counted call before it is made, while the command stands still.
        """
        more = {key: str(value) if isinstance(value, Path) else value for key, value in more.items()}
        with contextlib.ExitStack() as stack:
            if watch:
                more["stops"] = stack.enter_context(_stopping(watch))
                more.setdefault("limit", _WATCHED_SECONDS)
            request = {"words": [str(word) for word in words], "cwd": str(cwd), **more}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait(timeout=30)
        self.said.seek(0)
        pytest.fail(f"the process that runs command lines ended with {code}:\n{self.said.read()[-4000:]}")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.said.close()


@contextlib.contextmanager
def _stopping(watch: Callable[[int], None]) -> Iterator[list[str]]:
    """Two FIFOs on which a command says that it stands still, and is told to go on once `watch` is done."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        paths = [os.path.join(folder, name) for name in ("asked", "go")]
        for path in paths:
            os.mkfifo(path)
        asked, go = (os.open(path, os.O_RDWR) for path in paths)  # neither waits for the other end
        done = thread.submit(_let_go, asked, go, watch)
        try:
            yield paths
        finally:
            os.write(asked, _END)
            done.result()
            os.close(asked)
            os.close(go)


def _let_go(asked: int, go: int, watch: Callable[[int], None]) -> None:
    number, failure = 0, None
    while os.read(asked, 1) != _END:
        number += 1
        try:
            if failure is None:
                watch(number)
        except Exception as error:
            failure = error  # told once the command has ended
        os.write(go, _END)
    if failure:
        raise failure


def _compiler() -> str | None:
    return (shutil.which("gcc") or shutil.which("cc")) if sys.platform == "linux" else None


@pytest.fixture(scope="session")
def faulty_server(tmp_path_factory) -> Iterator[Server]:
    """Runs command lines that fail or die at a call of choice."""
    compiler = _compiler()
    if compiler is None:
        pytest.skip("no C compiler for the shim that makes system calls fail (apt install gcc)")
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"the shim does not compile:\n{done.stderr[-4000:]}")
    server = Server(shim)
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain_server(request) -> Iterator[Server]:
    """Runs command lines as they are. The other server does so, too, unless calls are to be counted: one takes seconds to start."""
    if _compiler():
        yield request.getfixturevalue("faulty_server")
        return
    server = Server(None)
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(faulty_server, tmp_path_factory) -> Path:
    """The pair with a measurement of it, and a bystander's files in the folder of the results."""
    from tests.faults.outcomes import words_of  # which knows the server of this file
    from tests.faults.pair import copy_of, make_pair

    made = make_pair(tmp_path_factory.mktemp("pair") / "made")
    done = faulty_server.run(*words_of("measure", out="dfs"), cwd=made)
    assert done["code"] == 0, done["stderr"]
    return copy_of(made, made.with_name("copy"))
