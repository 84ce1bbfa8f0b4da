"""The commands inside this process, where the libraries are already imported; starting one of its own takes seconds."""

import importlib
import io
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.refusals import refusal_code
from tests.tiny_pairs import contents
from utils.errors import run_command
from utils.publishing.disk import remove_empty


def run_here(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command as `run_command_line` does, but here: `run_here("lewis_merge.py", "--gamma", 0.3, cwd=folder)`."""
    words = [script, *map(str, arguments)]
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        if cwd is not None:
            patch.chdir(cwd)
        try:
            run_command(main)
        except SystemExit as ended:
            code = ended.code
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def done_here(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command that must succeed."""
    done = run_here(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def refused_here(code: str, script: str, *arguments: object, cwd: Path | None = None) -> str:
    """Run a command that must refuse with this code, and leave its folder as it was, but for finished work that it names,
    which is removed; returns the message."""
    folder = cwd or Path.cwd()
    before = contents(folder)
    done = run_here(script, *arguments, cwd=cwd)
    assert refusal_code(done) == code, done.stderr
    for kept in re.findall("stays in (.+), where it takes", done.stderr):
        shutil.rmtree(folder / kept)
        remove_empty(
            [parent for parent in (folder / kept).parents if parent.is_relative_to(folder) and parent != folder]
        )
    assert contents(folder) == before
    return done.stderr[done.stderr.index("error: ") :]
