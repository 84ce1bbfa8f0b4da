"""What the settings of gram_mean make of a merge: ridge, anchor, off_diagonal, rounds, and the ridge of a refit.

    python3 benchmarks/gram_settings.py --data DATA --seeds 0,1,2,3,4
    python3 benchmarks/gram_settings.py --data DATA --experts 3 --rows 48,200

Finds (or trains) the models of `benchmarks/quality.py` in the same `--work`, and merges with one setting changed at a time, or
two. Of several rounds the settings are those of the last merge; what is merged between them has the defaults. Appends to
`benchmarks/results/gram_settings.csv`; a run that is cut goes on with what was judged. `kept` is the share of an expert's
gain over the base, on validation and on test text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality_contenders import guided, in_rounds
from benchmarks.quality_settings import Asked, judge_settings, read_flags
from utils.errors import run_command

RESULTS = Path(__file__).resolve().parent / "results" / "gram_settings.csv"
RIDGES = (1e-5, 1e-7, 1e-6, 1e-4, 1e-3)  # the default first
OTHERS = (
    {"off_diagonal": 0.9, "ridge": RIDGES[0]},
    {"off_diagonal": 0.5, "ridge": RIDGES[0]},
    {"anchor": False, "ridge": RIDGES[0]},
    {"anchor": False, "ridge": 1e-4},
    {"embedding_rows": False, "ridge": RIDGES[0]},
)
REFIT_RIDGES = (1e-3, 1e-4, 1e-2, 1e-1)  # the default first
DENSITY = 0.1


def settings(tasks: list[str]) -> list[Asked]:
    """All settings, those that decide first: `tasks` are merged alone, cut and fitted anew."""
    rounds = {1: "gram_mean", 2: "gram_mean, two rounds"}
    found = [Asked(rounds[count], in_rounds(count, {"ridge": ridge})) for ridge in RIDGES for count in rounds]
    found += [Asked(rounds[count], in_rounds(count, one)) for one in OTHERS for count in rounds]
    found += [
        Asked(f"refit, {task}", guided("gram_mean", task, shared={"refit_ridge": ridge}, mean_density=DENSITY), task)
        for ridge in REFIT_RIDGES
        for task in tasks
    ]
    return [*found, Asked("gram_mean, three rounds", in_rounds(3, {"ridge": RIDGES[0]}))]


def main() -> None:
    """Merge and judge with every setting."""
    asked = read_flags(__doc__, RESULTS)
    tasks = ["math", "code"] if asked.data is None else ["gsm8k", "mbpp"]
    if not judge_settings(asked, settings(tasks if asked.experts == 2 else []), "gram_settings"):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
