"""The memory that a merge takes beside what the process had, and what was estimated; in a process of its own.

python -m tests.measured_merge FOLDER     merges FOLDER/r.yaml; --executor: all by mergekit, --counting: in pieces without sorting
"""

import argparse
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from tests.conftest import ROOT


def estimated_and_measured(folder: Path, *, executor: bool, counting: bool) -> tuple[float, float]:
    """Bytes: the estimate, and the peak of private memory."""
    flags = [*(["--executor"] if executor else []), *(["--counting"] if counting else [])]
    command = [sys.executable, "-m", "tests.measured_merge", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    estimate, measured = map(float, done.stdout.split()[-2:])
    return estimate, measured


def _private_bytes() -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024


def main() -> None:
    """Merge, watching."""
    from utils.commands.merge import merge
    from utils.merging import planning
    from utils.merging import run as merge_run
    from utils.merging.resources import memory_estimate
    from utils.merging.settings import MergeSettings

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--executor", action="store_true")
    parser.add_argument("--counting", action="store_true")
    given = parser.parse_args()
    run, divide, peak, ended, found = merge_run.run_merge, planning.divide, [0], threading.Event(), []

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], _private_bytes())
            time.sleep(0.002)

    def watched(planned, *rest):
        before, thread = _private_bytes(), threading.Thread(target=watch)
        thread.start()
        try:
            return run(planned, *rest)
        finally:
            ended.set()
            thread.join()
            found.append((memory_estimate(planned.plan, planned.division, planned.settings), peak[0] - before))

    merge_run.run_merge = watched
    if given.executor:
        planning.divide = lambda plan, settings: replace(divide(plan, settings), direct=(), left=())
    settings = {"device": "cpu", "quiet": True, "out_shard_size": 10**6, "fast_selection": given.counting}
    merge(MergeSettings(given.folder / "out", given.folder / "r.yaml", overwrite=True, **settings))
    print(*found[0])  # the last line, behind those of the merge


if __name__ == "__main__":
    main()
