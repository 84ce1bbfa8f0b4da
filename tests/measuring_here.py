"""Command 1 in this process, in the folder of a tiny pair."""

import subprocess
from typing import Any

from tests.commands_here import done_here, refused_here

SCRIPT = "lewis_importance.py"
ARGUMENTS = ("--config", "pair.yaml", "--out_dir", "out/deltas")
WRITTEN = {"code_delta.csv", "math_delta.csv", "norms.csv", "lewis_noise.csv", "manifest.json"}


def measure(*extra: Any, out: str = "out/deltas") -> subprocess.CompletedProcess:
    """Measure with LEWIS, which must succeed."""
    return done_here(SCRIPT, "--config", "pair.yaml", "--out_dir", out, *extra)


def refuses(code: str, *arguments: Any) -> str:
    """The command refuses with this code and changes nothing; its message."""
    return refused_here(code, SCRIPT, *(arguments or ARGUMENTS))
