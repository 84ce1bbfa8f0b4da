"""How much text guidance needs, and what other text does to it: gram_mean, its second round, tuned from that.

    python3 benchmarks/calibration_text.py --data DATA
    python3 benchmarks/calibration_text.py --data DATA --guidance "gram_mean, two rounds;tuned" --rows 15,50,100

Finds (or trains) the models of `benchmarks/quality.py` in the same `--work`, measures them on so many calibration rows a
task; on 48 rows of which half, or all, are the other task's; on 48 of another source (the offline example's arithmetic and
functions); merges by the defaults and judges on test text. Where command 1 refuses the text for want of a gain, that is
noted, and the figure is that of `--accept_useless_text`. Appends to `benchmarks/results/calibration_text.csv`; a run that is
cut goes on with what was judged.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality import ROWS
from benchmarks.quality_contenders import Variant, in_rounds, tuned
from benchmarks.quality_merges import TEST, Judge
from benchmarks.quality_more_text import ELSEWHERE, HALF, OWN, SWAPPED, text_of_kind
from benchmarks.quality_pairs import CALIBRATION_SAMPLES, Pair, lay_out
from benchmarks.quality_seed import Piece, models_and_texts, pair_folder, shares_kept
from benchmarks.quality_settings import TRAININGS
from benchmarks.quality_sheet import Sheet
from utils.errors import UserError, run_command

RESULTS = Path(__file__).resolve().parent / "results" / "calibration_text.csv"
USELESS = "text-without-gain"
ACCEPT = "accept_useless_text"
GUIDANCE: dict[str, Callable[[Mapping[str, Any]], Variant]] = {
    "gram_mean": lambda measure: in_rounds(1, measure=measure),
    "gram_mean, two rounds": lambda measure: in_rounds(2, measure=measure),
    "tuned": lambda measure: tuned(in_rounds(2, measure=measure), measure),
}
KEY = ("size", "seed", "guidance", "text", "rows")


@dataclass(frozen=True)
class Line:
    """One merge on one task; `refused` is the code with which command 1 refused the text, "" if it did not."""

    size: str
    seed: int
    guidance: str
    text: str
    rows: int
    refused: str
    task: str
    kept: float


def recipe_on(pair: Pair, guidance: str, device: str) -> tuple[Path, str]:
    """The recipe that guidance makes of a pair's text, and the code with which it was refused before it was accepted."""
    variant = GUIDANCE[guidance]
    try:
        return variant({}).recipe(pair, device), ""
    except UserError as error:
        if error.code != USELESS:
            raise
        return variant({ACCEPT: True}).recipe(pair, device), error.code


def lines(
    asked: argparse.Namespace, seed: int, sheet: Sheet, kinds: Sequence[tuple[str, int]]
) -> Iterator[tuple[Line, ...]]:
    """The merges of a seed that the file has not, on kinds of text: whose, and how many rows."""
    piece = Piece(asked.size, TRAININGS[asked.size], seed, 2, asked.data, asked.work.resolve(), asked.device, ROWS)
    trained, texts = models_and_texts(piece)
    folder = pair_folder(piece, trained) / "calibration_text"
    for text, rows in kinds:
        own = text_of_kind(texts, text, rows, asked.data, seed)
        pair = lay_out(trained, own, folder / f"{text} {rows}", samples=rows)
        judge = Judge(pair, texts, ROWS, asked.device)
        for guidance in (one.strip() for one in asked.guidance.split(";")):
            key = (asked.size, seed, guidance, text, rows)
            if sheet.has(**dict(zip(KEY, key, strict=True))):
                continue
            recipe, refused = recipe_on(pair, guidance, asked.device)
            kept = shares_kept(judge, judge.recipe_losses(recipe, TEST), TEST)
            yield tuple(Line(*key, refused, task, share) for task, share in kept.items())


def main() -> None:
    """Measure, merge and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and mbpp/; default: the offline example's text")
    parser.add_argument("--size", choices=tuple(TRAININGS), default="small")
    parser.add_argument("--seeds", default="0", help="by comma")
    parser.add_argument("--guidance", default="gram_mean", help=f"by semicolon: {'; '.join(GUIDANCE)}")
    parser.add_argument("--rows", default="5,15,48", help="how many rows of own text, by comma")
    parser.add_argument("--skip_foreign", action="store_true", help="no text of other tasks or sources")
    parser.add_argument("--work", type=Path, default=Path("output/quality"), help="the folder of benchmarks/quality.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()

    from utils.merging.guided.methods import register_methods

    register_methods()
    kinds = [(OWN, int(rows)) for rows in asked.rows.split(",")]
    kinds += [] if asked.skip_foreign else [(text, CALIBRATION_SAMPLES) for text in (ELSEWHERE, HALF, SWAPPED)]
    sheet = Sheet(asked.results, Line, KEY)
    for seed in map(int, asked.seeds.split(",")):
        for found in lines(asked, seed, sheet, kinds):
            sheet.add(*found)
            shown = ", ".join(f"{line.task} {line.kept:.1%}" for line in found)
            print(
                f"{found[0].guidance}, {found[0].rows} rows, {found[0].text} text: {shown} {found[0].refused}",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main)
