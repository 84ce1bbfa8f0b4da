"""A signal ends a command with its own exit code, and a command that has succeeded with 0.

python -m pytest tests/test_signals.py
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from utils.signals import STOPPING, Interrupted, signals_held, unwind_on_signals


@pytest.fixture(autouse=True)
def own_handlers():
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", STOPPING)
def test_every_stopping_signal_unwinds(signum):
    signal.signal(signum, signal.SIG_DFL)
    unwind_on_signals()
    with pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert caught.value.signum == signum


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    unwind_on_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_signals_wait_until_a_block_is_done():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unwind_on_signals()
    done = []
    with pytest.raises(Interrupted) as caught, signals_held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(True)
    assert done and caught.value.signum == signal.SIGTERM


SCRIPT = """
import os, signal, time
from utils.errors import run_command
from utils.signals import finish

def main():
    {before}
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.2)
    print("end")

run_command(main, one_result={one})
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("one", [True, False])
def test_exit_codes(name, published, one):
    script = SCRIPT.format(name=name, before="finish()" if published else "pass", one=one)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if published and one:
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
    else:
        assert ended.returncode == 128 + getattr(signal, name)
        assert (ended.stdout, ended.stderr) == ("", "interrupted; nothing unfinished was left behind\n")


INTERRUPTED_IMPORT = """
import os, signal, sys

class Stopping:
    def find_spec(self, name, path=None, target=None):
        if name == "utils.errors":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Stopping())
"""
COMMANDS = ("lewis_importance.py", "lewis_merge.py", "utils/merger.py", "utils/evaluator.py", "utils/searcher.py")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_while_a_command_is_imported(command, name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT.format(name=name))
    ended = subprocess.run(
        [sys.executable, command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 128 + getattr(signal, name)
    assert (ended.stdout, ended.stderr) == ("", "interrupted; nothing unfinished was left behind\n")
