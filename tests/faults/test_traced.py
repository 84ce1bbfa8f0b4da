"""System calls of every command, traced: no sockets, no other programs, no reads outside the inputs, no writes outside outputs.

python -m pytest tests/faults/test_traced.py -m slow
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.pair import COMMANDS, RESULTS, make_pair

pytestmark = pytest.mark.slow
CALLS = (
    "%network,execve,execveat,open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,"
    "linkat,symlink,symlinkat,truncate,chmod,fchmodat"
)
SYSTEM = ("/usr/", "/lib", "/etc/", "/proc/", "/sys/", "/dev/", "/opt/", "/bin/", "/sbin/", "/run/")
_LINE = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+= (-?\d+)(.*)$")
_NAMED = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The pair, with a measurement of it."""
    made = make_pair(tmp_path_factory.mktemp("pair") / "made")
    words = [word.removeprefix("out/") for word in COMMANDS["measure"]]
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=made, check=True, capture_output=True)
    return made


def _traced(folder: Path, logs: Path, command: str) -> list[tuple[str, str, int]]:
    """(call, arguments, returned) of a command's whole life that succeeded."""
    script, *words = COMMANDS[command]
    (logs / "home").mkdir()
    (logs / "tmp").mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(logs / "home"), "TMPDIR": str(logs / "tmp"),
    }  # fmt: skip
    tracer = [
        "strace",
        "-f",
        "-y",
        "--seccomp-bpf",
        "-qq",
        "-s",
        "4096",
        "-e",
        f"trace={CALLS}",
        "-o",
        str(logs / "calls"),
    ]
    done = subprocess.run(
        [*tracer, sys.executable, str(ROOT / script), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [match for line in (logs / "calls").read_text().splitlines() if (match := _LINE.match(line))]
    return [(match[1], match[2], int(match[3])) for match in found if int(match[3]) >= 0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_touches_nothing_but_its_inputs_and_outputs(folder, tmp_path, command):
    if shutil.which("strace") is None:
        pytest.skip("no strace here (apt install strace)")
    shutil.rmtree(folder / "out", ignore_errors=True)
    calls = _traced(folder, tmp_path, command)
    assert len(calls) > 1000  # the libraries' own files, at least: the trace was read
    assert [call for call in calls if call[0] in ("socket", "connect", "bind", "sendto")] == []
    assert len([call for call in calls if call[0].startswith("execve")]) == 1  # the interpreter's own
    python = (sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), str(ROOT))
    ours = (str(folder), str(tmp_path / "home"), str(tmp_path / "tmp"))
    changed = (str(folder / RESULTS[command]), *ours[1:])
    for name, arguments, _ in calls:
        if name.startswith("execve"):
            continue
        for path in _paths(name, arguments, folder):
            writes = not name.startswith("open") or bool(re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments))
            if not writes:
                assert path.startswith((*python, *ours, *SYSTEM)), (name, arguments)
            elif path != "/dev/null" and not path.startswith(
                "/dev/shm/sem."
            ):  # a lock of the progress bar, unlinked at once
                hidden = str(folder / "out" / f".{Path(RESULTS[command]).name}.")
                assert path.startswith((*changed, hidden)) or path == str(folder / "out"), (name, arguments)
    assert list((tmp_path / "tmp").iterdir()) == []


def _paths(name: str, arguments: str, folder: Path) -> list[str]:
    """The paths that a call names, absolute."""
    found = [os.path.normpath(os.path.join(start or folder, path)) for start, path in _NAMED.findall(arguments)]
    return found[:1] if name.startswith("open") else found if name.startswith(("rename", "link")) else found[-1:]
