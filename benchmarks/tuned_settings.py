"""What the settings of tuned make of a merge: steps, rate, pull, level, the aim, and where it starts.

    python3 benchmarks/tuned_settings.py --data DATA --seeds 0,1,2
    python3 benchmarks/tuned_settings.py --data DATA --experts 3 --rows 48,100,200

Finds (or trains) the models of `benchmarks/quality.py` in the same `--work`. The start is gram_mean in two rounds, whose own
lines are there to compare with; `--rows` is the text of both. Appends to `benchmarks/results/tuned_settings.csv`; a run that
is cut goes on with what was judged. `kept` is the share of an expert's gain over the base, on validation and on test text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality_contenders import in_rounds, tuned
from benchmarks.quality_settings import Asked, judge_settings, read_flags
from utils.errors import run_command

RESULTS = Path(__file__).resolve().parent / "results" / "tuned_settings.csv"
FLAGS = (
    {},  # the defaults: 10 steps, rate 0.05, no pull, a coefficient for each tensor, the mean over tasks
    {"tune_steps": 20},
    {"tune_for": "worst", "tune_steps": 20},
    {"tune_steps": 30},
    {"tune_level": "part", "tune_steps": 20},
    {"tune_level": "block", "tune_steps": 20},
    {"tune_level": "expert", "tune_steps": 20},
    {"tune_rate": 0.02, "tune_steps": 30},
    {"tune_rate": 0.1},
    {"tune_pull": 0.1, "tune_steps": 20},
)


def settings() -> list[Asked]:
    """All settings, those that decide first."""
    start = in_rounds(2)
    found = [Asked("tuned from two rounds", tuned(start, flags)) for flags in FLAGS]
    return [
        Asked("start: gram_mean, two rounds", start),
        *found,
        Asked("tuned from the plain mean", tuned(None, {"tune_steps": 20})),
    ]


def main() -> None:
    """Tune, merge and judge with every setting."""
    if not judge_settings(read_flags(__doc__, RESULTS), settings(), "tuned_settings"):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
