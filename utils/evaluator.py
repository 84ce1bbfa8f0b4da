"""Did it help? Evaluate merge recipes and models on held-out text, paired, against the base, the experts and uniform merges.

    python3 utils/evaluator.py --config configs/gemma_2b.yaml --out_dir output/gemma_2b/evaluation \\
        output/gemma_2b/merge_configs/gemma_2b_0.3_0.8_generated_ties_merge_config.yaml

A candidate is a recipe (YAML; its model is never written), a model folder or a hub id. Without candidates the recipes
beside --out_dir are taken. Checks everything that can be known first, scores many candidates in one pass over the inputs,
and writes scores.csv, samples.parquet, report.html and manifest.json. Typed again it goes on where it stopped and scores
only what is new.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: its own folder stands first on the path, the repository has to
    sys.path[0] = str(Path(__file__).parents[1])

if __name__ == "__main__":  # before all that takes time to import
    from utils.signals import end_on_signals

    end_on_signals()

from utils.errors import run_command
from utils.flags import FlagParser, path, whole_number
from utils.runtime import let_waiting_threads_sleep

if TYPE_CHECKING:
    from utils.commands.evaluate_options import EvaluateOptions


def main() -> None:
    """Parse the flags into one checked value and make one call."""
    options = read_flags()

    let_waiting_threads_sleep()

    from utils.commands.evaluate import evaluate

    evaluate(options)


def read_flags(words: Sequence[str] | None = None) -> "EvaluateOptions":
    """Read the command line, or `words` in its place."""
    parser = FlagParser(prog="utils/evaluator.py", description=__doc__)
    parser.add_argument("candidates", nargs="*", metavar="CANDIDATE", help="a recipe, a model folder or a hub id")
    parser.flag("config", "pair config: the YAML that names the models and the text", type=path, required=True)
    parser.flag("out_dir", "folder to write the scores into; made if needed", type=path, required=True)
    parser.flag("against", "reference of differences: a candidate, base, an expert, a control [default: best uniform]")
    parser.switch("controls", "score uniform task arithmetic and uniform TIES, too", default=True)
    parser.switch("samples", "have up to 8 held-out prompts answered, for the report", default=True)
    parser.flag("test_rows", "rows a task that figures are taken of", type=whole_number(2, 10**6), default=128)
    parser.flag("validation_rows", "rows a task that settings are chosen on", type=whole_number(2, 10**6), default=64)
    parser.computing_flags(
        "candidates go side by side, in lm-eval's tasks, too (one GPU may be named several times); replaces --device"
    )
    parser.flag("lm_eval_batch", "prompts of lm-eval's at a time", type=whole_number(1, 2**20), default=8)
    parser.flag("random_seed", "seed of methods that draw (dare, della)", type=whole_number(0, 2**32 - 1), default=0)
    parser.switch("trust_remote_code", "run Python code that comes with a model")
    parser.switch("confirm_run_unsafe_code", "let lm-eval tasks run code that models write, and code of their own")
    parser.switch("overwrite", "replace files of the same names in --out_dir")
    flags = vars(parser.parse(words))

    from utils.commands.evaluate_options import EvaluateOptions
    from utils.pair.config import read_pair_config

    flags["config"] = read_pair_config(flags["config"])
    flags["candidates"] = tuple(flags["candidates"])
    return EvaluateOptions(**flags)


if __name__ == "__main__":
    run_command(main, one_result=True)
