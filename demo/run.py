"""The offline example from beginning to end: three small models, the five commands.

Run from the repository root, in the project's environment (`make demo` does both; some minutes, no network):

    python3 demo/run.py
"""

# Only the standard library here: each step runs in a process of its own, as a user would start it.
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("output/demo")
# Which output folders an earlier run of this script handed to the commands, and may therefore be overwritten.
RECORD = OUT / "demo_folders.json"
FRAMES, RECIPES = OUT / "delta_dfs", OUT / "merge_configs"
EVALUATION, SEARCH, MERGED = OUT / "evaluation", OUT / "search", OUT / "merged_models" / "search"
TRIALS = 12
ROWS = ["--validation_rows", "8", "--test_rows", "24"]  # few, so that the example ends in minutes


def commands(ours: Collection[Path]) -> list[list[str]]:
    """The commands in their order, without the interpreter; `--overwrite` where the output folder is in `ours`.

    A search goes on in its folder by itself.
    """
    config = "configs/demo.yaml"
    measure = ["lewis_importance.py", "--config", config, "--out_dir", str(FRAMES)]
    decide = ["lewis_merge.py", "--delta_dfs_in_dir", str(FRAMES), "--config_file", config, "--out_dir", str(RECIPES)]
    decide += ["--gamma", "0.3", "--epsilon", "0.8", "--merge_method", "ties", "--control", "uniform", "--plot"]
    evaluate = ["utils/evaluator.py", "--config", config, "--out_dir", str(EVALUATION), *ROWS, "--no-samples"]
    search = ["utils/searcher.py", "--config", config, "--out_dir", str(SEARCH), "--trials", str(TRIALS), "--measure"]
    search += [*ROWS, "--first_rows", "4"]
    merge = ["utils/merger.py", "--output_path", str(MERGED), "--merge_config", str(SEARCH / "best.yaml")]
    steps = [(measure, FRAMES), (decide, RECIPES), (evaluate, EVALUATION), (search, None), (merge, MERGED)]
    return [["-m", "demo.train"], *(command + ["--overwrite"] * (folder in ours) for command, folder in steps)]


def claim_folders() -> list[Path]:
    """Return the output folders of earlier runs, and record those of this run: the ones that are not there yet.

    A folder that something else filled is never recorded; the command that finds it there refuses it.
    """
    try:
        earlier = [Path(name) for name in json.loads(RECORD.read_text())]
    except (FileNotFoundError, ValueError):  # no earlier run, or one that was killed while it wrote the record
        earlier = []
    folders = (FRAMES, RECIPES, EVALUATION, MERGED)
    free = [path for path in folders if not path.exists() or (path.is_dir() and not any(path.iterdir()))]
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(sorted({str(path) for path in (*earlier, *free)}), indent=2) + "\n")
    return [path for path in earlier if path not in free]


def environment() -> dict[str, str]:
    """The environment of every step: no network, and threads that sleep while they wait for each other.

    Spinning threads, the default of PyTorch's OpenMP, take the cores from one another as soon as anything else runs:
    training models this small then takes several times as long.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1"}


def run(command: list[str]) -> int:
    """Print the command as a user would type it, run it with this interpreter, return its exit code."""
    print(f"\n$ python3 {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *command], env=environment()).returncode
    print(f"[{time.monotonic() - started:.0f} s]", flush=True)
    return code


def main() -> int:
    """Run all steps; the exit code is that of the first step that fails, 2 for a wrong working folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if Path.cwd() != ROOT:
        print(f"error: the example's paths start at the repository root: first `cd {ROOT}`", file=sys.stderr)
        return 2
    started = time.monotonic()
    for command in commands(claim_folders()):
        if code := run(command):
            print(f"error: the step above ended with exit code {code}; the example stops here", file=sys.stderr)
            return code
    print("\nThe pages to look at, in a browser:")
    print(f"  {EVALUATION / 'report.html'}\n  {SEARCH / 'report.html'}")
    print("The heatmaps of LEWIS's densities, layer by component:")
    print("\n".join(f"  {path}" for path in sorted(RECIPES.glob("*.png"))))
    print(f"The recipes lie beside them, the best one in {SEARCH}, its merged model in {MERGED}.")
    print(f"Whole example: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
