"""Does guidance help, and which? Trains small models, merges them in many ways, judges them on held-out text.

    python3 benchmarks/quality.py --data DATA
    python3 benchmarks/quality.py --data DATA --preset gpu
    python3 benchmarks/quality.py --data DATA --preset long        # experts trained three times as long
    python3 benchmarks/quality.py --sizes small --seeds 2          # a look; the offline example's text
    until python3 benchmarks/quality.py --data DATA --minutes 40; do :; done      # in parts
    python3 benchmarks/quality.py --data DATA --experts 2 --contenders "gram mean, second round;Fisher average"

`DATA` holds `gsm8k/{train,test}.jsonl` and `mbpp/{train,validation,test,prompt}.jsonl`; without it the offline example's
text is used. Per seed a base and an expert per task are trained from nothing (cached by a hash of what made them), every
method measures them on calibration text from the train split, settings are chosen on validation, and figures are taken on
test. The unit is the seed: differences to the control are paired, with 95 % intervals. Recipes are made and merged by the
functions behind the three commands; one recipe per method also goes through the commands themselves and must agree bit for
bit. Merges are written in bfloat16.
Writes `quality.csv`, `quality.md` and `quality.png` (with `_gpu`, `_long`, `_head`: of that preset) into `benchmarks/results/`.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_contenders import Choice
from benchmarks.quality_models import MEDIUM, SMALL, TINY, Training
from demo.small_model import Shape
from utils.errors import UserError, run_command

if TYPE_CHECKING:
    from benchmarks.quality_seed import Judged, Piece

RESULTS = Path(__file__).resolve().parent / "results"
UNFINISHED = 75  # the exit status while there is work left (sysexits.h: temporary failure)
ROWS = {"validation": 40, "test": 80}
LARGE = Training(
    Shape(vocabulary=8192, hidden=768, intermediate=2048, blocks=12, heads=12),
    batch=32,
    base_steps=1500,
    expert_steps=300,
    base_rate=1e-3,
    expert_rate=2e-4,
)


@dataclass(frozen=True)
class Size:
    """A size, its training, and how many seeds of it are run."""

    name: str
    training: Training
    seeds: int


def trained_long(training: Training) -> Training:
    """The same with experts that are trained three times as long, on the same base."""
    return replace(training, expert_steps=3 * training.expert_steps)


PRESETS = {
    "cpu": (Size("small", SMALL, 5), Size("medium", MEDIUM, 3)),
    "gpu": (Size("small", SMALL, 5), Size("medium", MEDIUM, 3), Size("large", LARGE, 1)),
    "long": (
        Size("tiny-long", trained_long(TINY), 1),
        Size("small-long", trained_long(SMALL), 5),
        Size("medium-long", trained_long(MEDIUM), 3),
    ),
    "head": (Size("tiny", TINY, 1), Size("tiny-own-head", replace(TINY, tied=False), 1)),
}


def main() -> None:
    """Train, merge and judge all seeds, then report what is there."""
    asked = _flags()
    sizes = [size for size in PRESETS[asked.preset] if asked.sizes is None or size.name in asked.sizes.split(",")]
    seeds = [
        _pieces(size, seed, asked)
        for size in reversed(sizes)  # the longest first, so that no core waits in the end
        for seed in range(min(size.seeds, asked.seeds or size.seeds))
    ]
    found = _judge_all(seeds, asked.workers or os.cpu_count() or 1)
    if not asked.skip_commands and all(one.stopped_before is None for one in found.values()):
        from benchmarks.quality_commands import check_commands
        from benchmarks.quality_seed import prepare

        first = min(found, key=lambda piece: (piece.training.shape.hidden, piece.seed))
        _one_thread()  # as the processes that measured before: sums depend on the number of threads
        pair, _ = prepare(first.training, first.seed, first.data, first.work, first.device)
        check_commands(pair, first.device)
    _report(list(found.values()), asked)
    for piece, one in found.items():
        if one.stopped_before:
            print(f"{piece.label}: stopped before {one.stopped_before}", file=sys.stderr)
        for name in one.failed:
            print(f"{piece.label}: {name} failed, see above", file=sys.stderr)
    if any(one.failed for one in found.values()):
        sys.exit(1)
    if any(one.stopped_before for one in found.values()):
        print(f"{asked.minutes:g} minutes are over; run the same again to go on", file=sys.stderr)
        sys.exit(UNFINISHED)


def _pieces(size: Size, seed: int, asked: argparse.Namespace) -> "list[Piece]":
    """One seed, by the number of experts of its merges."""
    from benchmarks.quality_seed import Piece

    choice = Choice(_listed(asked.contenders, ";", str), _listed(asked.budgets, ",", float))
    device = asked.device or ("cuda" if asked.preset == "gpu" else "cpu")
    experts = _listed(asked.experts, ",", int)
    if asked.data is None and 3 in experts:
        raise UserError(
            f"--experts {asked.experts}: the third task is source code of the standard library, which the offline example's "
            "second task is, too; give --data, or leave 3 out",
            "quality-third-task-offline",
        )
    until = None if asked.minutes is None else asked.begun + 60 * asked.minutes
    where = {"data": asked.data, "work": asked.work.resolve(), "device": device, "rows": ROWS}
    return [Piece(size.name, size.training, seed, count, **where, choice=choice, until=until) for count in experts]


def _judge_all(seeds: "list[list[Piece]]", workers: int) -> "dict[Piece, Judged]":
    """Train every seed once, then judge its pieces side by side; those of a seed that was cut or failed are not begun."""
    from benchmarks.quality_seed import Judged, judge_piece, train

    found = {}
    with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
        trainings = {pool.submit(train, pieces[0]): pieces for pieces in seeds}
        running = {}
        for training in as_completed(trainings):
            pieces, error = trainings[training], training.exception()
            if error is None:
                print(f"{pieces[0].size}, seed {pieces[0].seed}: trained", file=sys.stderr, flush=True)
                running |= {pool.submit(judge_piece, piece): piece for piece in pieces}
            elif isinstance(error, OutOfTimeError):
                found |= {piece: Judged([], stopped_before=str(error)) for piece in pieces}
            else:
                found |= {piece: Judged([], failed=[f"training ({error!r})"]) for piece in pieces}
        for done in as_completed(running):
            error = done.exception()
            found[running[done]] = done.result() if error is None else Judged([], failed=[f"everything ({error!r})"])
    return found


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and mbpp/; default: the offline example's text")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="gpu: on a GPU, with a size of about 100 M parameters; long: experts trained three times as long; head: models "
        "whose head is the embedding, or not",
    )
    parser.add_argument("--device", help="where to train, merge and judge (default: cuda for the preset gpu, else cpu)")
    parser.add_argument("--sizes", help="only these, by comma: small,medium")
    parser.add_argument("--seeds", type=int, help="at most so many seeds of each size")
    parser.add_argument("--contenders", help="only these beside the controls, by semicolon")
    parser.add_argument("--budgets", help="only these densities of one expert, by comma")
    parser.add_argument("--experts", default="1,2", help="merges of how many experts, by comma; 3: with a third task")
    parser.add_argument("--minutes", type=float, help="begin no work after so many; the same command goes on later")
    parser.add_argument("--workers", type=int, help="processes side by side (default: one per core; all share a GPU)")
    parser.add_argument("--work", type=Path, default=Path("output/quality"), help="models, recipes and what was judged")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV, the tables and the plot go")
    parser.add_argument(
        "--skip_commands", action="store_true", help="do not repeat a recipe per method by the commands"
    )
    asked = parser.parse_args()
    asked.begun = time.time()
    return asked


def _listed(text: str | None, between: str, kind: type) -> tuple | None:
    """The parts of a flag's value; None where it was not given."""
    return None if text is None else tuple(kind(part.strip()) for part in text.split(between))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _report(judged: "list[Judged]", asked: argparse.Namespace) -> None:
    from benchmarks.quality_contenders import CONTROLS
    from benchmarks.quality_report import compare, draw, markdown, write_figures

    figures = [figure for one in judged for figure in one.figures]
    end = "" if asked.preset == "cpu" else f"_{asked.preset}"
    figures.sort(key=lambda one: (one.experiment, one.size, one.seed))
    write_figures(asked.results / f"quality{end}.csv", figures)
    comparisons = compare(figures, CONTROLS)
    if not comparisons:
        return print("nothing is judged yet")
    tables = markdown(comparisons)
    (asked.results / f"quality{end}.md").write_text(tables + "\n", encoding="utf-8")
    draw(comparisons, asked.results / f"quality{end}.png")
    print(tables)
    seconds = sum(one.seconds for one in judged)
    print(
        f"\n{seconds / 60:.0f} minutes of one core for merging and judging, from nothing; wrote "
        f"{asked.results}/quality{end}.csv, .md and .png"
    )


if __name__ == "__main__":
    run_command(main)
