"""Find the best merge recipe of a pair: Optuna chooses, candidates race on held-out text, the winner is held against uniform merges.

    python3 utils/searcher.py --config configs/gemma_2b.yaml --out_dir output/gemma_2b/search --trials 64

Tries first what a careful user tries by hand (uniform task arithmetic and TIES, LiNeS, every guidance at its defaults), then
what Optuna makes of it, in the space that `search:` in the pair config describes. Measurements beside --out_dir are used;
--measure makes those that are missing. No merged model is written. Ends with best.yaml, a table on test rows, report.html,
trials.csv and the command that merges. Typed again it goes on where it stopped; with more --trials it extends.

    optuna-dashboard sqlite:///output/gemma_2b/search/study.db
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: its own folder stands first on the path, the repository has to
    sys.path[0] = str(Path(__file__).parents[1])

if __name__ == "__main__":  # before all that takes time to import
    from utils.signals import end_on_signals

    end_on_signals()

from utils.commands.ray_flags import RayFlags
from utils.errors import run_command
from utils.flags import FlagParser, number, path, whole_number
from utils.merging.settings import byte_count
from utils.runtime import let_waiting_threads_sleep

if TYPE_CHECKING:
    from utils.commands.search_options import SearchOptions

SAMPLERS = ("auto", "tpe", "gp", "random")
OBJECTIVES = ("mean", "worst", "weighted")


def main() -> None:
    """Parse the flags into one checked value and make one call."""
    options = read_flags()

    let_waiting_threads_sleep()

    from utils.commands.search import search_pair

    search_pair(options)


def read_flags(words: Sequence[str] | None = None) -> "SearchOptions":
    """Read the command line, or `words` in its place."""
    parser = FlagParser(prog="utils/searcher.py", description=__doc__)
    _declare_flags(parser)
    flags = vars(parser.parse(words))
    flags.pop("traceback", None)

    from utils.commands.search_options import SearchOptions
    from utils.pair.config import read_pair_config

    flags["ray"] = RayFlags.taken(flags)
    flags["config"] = read_pair_config(flags["config"])
    return SearchOptions(**flags)


def _declare_flags(parser: FlagParser) -> None:
    parser.flag("config", "pair config: the YAML that names models, text and space", type=path, required=True)
    parser.flag("out_dir", "the search's folder; made if needed, gone on with if it is there", type=path, required=True)
    parser.flag("trials", "recipes to try in all, the knowns among them", type=whole_number(4, 10**6), default=64)
    parser.flag("batch", "recipes that are asked for and raced together", type=whole_number(1, 1024), default=8)
    parser.flag(
        "sampler",
        "of Optuna: tpe, for mixed spaces; gp, for few numbers; random; auto: by the space",
        choices=SAMPLERS,
        default="auto",
    )
    parser.flag(
        "objective",
        "share of the experts' gain kept: the mean over tasks, the worst task's, or weighted (search.objective_weights)",
        choices=OBJECTIVES,
        default="mean",
    )
    parser.switch("pareto", "search a Pareto front over the tasks; the objective chooses the winner on it")
    parser.flag("seed", "of the sampler", type=whole_number(0, 2**32 - 1), default=0)
    parser.switch("measure", "measure the pair with every guidance that is missing, or that search.guidance names")
    parser.flag("validation_rows", "rows a task that recipes are chosen on", type=whole_number(4, 10**6), default=64)
    parser.flag("test_rows", "rows a task that the winner is judged on", type=whole_number(2, 10**6), default=128)
    parser.flag("first_rows", "rows a task in the first round of a race", type=whole_number(4, 10**6), default=6)
    parser.flag(
        "margin",
        "points of gain kept by which a recipe must be better than the best of a race to stay in it",
        type=number(0, 100),
        default=0.5,
    )
    parser.computing_flags("candidates go side by side; replaces --device")
    parser.switch("samples", "have up to 8 held-out prompts answered, for the report", default=True)
    parser.flag("max_hours", "end in time: what was found by then is judged", type=number(0, math.inf, low_open=True))
    parser.flag("max_disk", "end before --out_dir holds more than this, e.g. 500M, 5G", type=byte_count)
    parser.ray_flags()
    parser.switch("trust_remote_code", "run Python code that comes with a model")


if __name__ == "__main__":
    run_command(main)
