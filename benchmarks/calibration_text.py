"""How much text gram_mean needs, and what text of other tasks does to it: one seed of the small models.

    python3 benchmarks/calibration_text.py --data DATA

Finds (or trains) the models of `benchmarks/quality.py` in the same `--work`, measures them on 5, 15 and 48 calibration rows
a task; on 48 rows of which half, or all, are the other task's; merges by the defaults and judges on test text. Where command
1 refuses the text for want of a gain, that is noted, and the figure is that of `--accept_useless_text`. Writes
`benchmarks/results/calibration_text.csv`; a run that is cut goes on with what was judged.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality import ROWS
from benchmarks.quality_merges import TEST, Judge
from benchmarks.quality_models import SMALL, Trained
from benchmarks.quality_pairs import CALIBRATION_SAMPLES, Pair, lay_out, measured, recipe_of
from benchmarks.quality_seed import prepare, shares_kept
from benchmarks.quality_texts import Texts
from utils.errors import UserError, run_command

RESULTS = Path(__file__).resolve().parent / "results" / "calibration_text.csv"
OWN, HALF, SWAPPED = "own", "half another task's", "another task's"
USELESS = "text-without-gain"
ACCEPT = "accept_useless_text"


@dataclass(frozen=True)
class Line:
    """One merge on one task; `refused` is the code with which command 1 refused the text, "" if it did not."""

    seed: int
    text: str
    rows: int
    refused: str
    task: str
    kept: float


def other_texts(texts: Texts, rows: int, text: str) -> Texts:
    """The texts with other calibration rows: so many, of each task's own or of the next task's."""
    names = list(texts.tasks)
    tasks = {}
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        own, other = texts.tasks[name].calibration[:rows], texts.tasks[following].calibration[:rows]
        mixed = {OWN: own, SWAPPED: other, HALF: (*own[: rows // 2], *other[rows // 2 :])}
        tasks[name] = replace(texts.tasks[name], calibration=mixed[text])
    return replace(texts, tasks=tasks)


def recipe_on(pair: Pair, device: str) -> tuple[Path, str]:
    """The recipe that gram_mean makes of a pair's text, and the code with which it was refused before it was accepted."""
    refused = ""
    try:
        folder = measured(pair, "gram_mean", device)
    except UserError as error:
        if error.code != USELESS:
            raise
        refused = error.code
        folder = measured(pair, "gram_mean", device, "gram_mean_accepted", **{ACCEPT: True})
    return recipe_of(pair, pair.both, "gram_mean", {}, device, folder)[0], refused


def lines(
    seed: int, trained: Trained, texts: Texts, judge: Judge, device: str, kinds: Sequence[tuple[str, int]]
) -> Iterator[Line]:
    """The merges of a seed on kinds of text: whose, and how many rows."""
    for text, rows in kinds:
        pair = judge.pair
        if (text, rows) != (OWN, CALIBRATION_SAMPLES):  # else what all benchmarks measure
            pair = lay_out(trained, other_texts(texts, rows, text), pair.folder / "calibration_text" / f"{text} {rows}")
        recipe, refused = recipe_on(pair, device)
        for task, kept in shares_kept(judge, judge.recipe_losses(recipe, TEST), TEST).items():
            yield Line(seed, text, rows, refused, task, kept)


def main() -> None:
    """Measure, merge and judge one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and mbpp/; default: the offline example's text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="5,15,48", help="how many rows of own text, by comma")
    parser.add_argument("--skip_foreign", action="store_true", help="no text of other tasks")
    parser.add_argument("--work", type=Path, default=Path("output/quality"), help="the folder of benchmarks/quality.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()

    from utils.merging.guided.methods import register_methods

    register_methods()
    pair, texts = prepare(SMALL, asked.seed, asked.data, asked.work.resolve(), asked.device)
    judge = Judge(pair, texts, ROWS, asked.device)
    kinds = [(OWN, int(rows)) for rows in asked.rows.split(",")]
    kinds += [] if asked.skip_foreign else [(HALF, CALIBRATION_SAMPLES), (SWAPPED, CALIBRATION_SAMPLES)]
    found: list[Line] = []
    for line in lines(asked.seed, pair.trained, texts, judge, asked.device, kinds):
        found.append(line)
        print(f"{line.rows} rows, {line.text} text, {line.task}: {line.kept:.1%} {line.refused}", flush=True)
        write(asked.results, found)


def write(path: Path, found: Sequence[Line]) -> None:
    """Write what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Line)])
        writer.writerows([getattr(line, field.name) for field in fields(Line)] for line in found)


if __name__ == "__main__":
    run_command(main)
