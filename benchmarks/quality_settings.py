"""Settings of one method, side by side: each is merged as it is and judged on validation and on test, over seeds.

Nothing is chosen here: a line is one setting on one seed. Processes may share models and the file of lines, not a seed.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import PRESETS, ROWS
from benchmarks.quality_contenders import Variant
from benchmarks.quality_merges import TEST, VALIDATION, Judge
from benchmarks.quality_more_text import with_more_calibration
from benchmarks.quality_pairs import CALIBRATION_SAMPLES, lay_out
from benchmarks.quality_seed import Piece, models_and_texts, pair_folder, shares_kept
from benchmarks.quality_sheet import Sheet

TRAININGS = {size.name: size.training for sizes in PRESETS.values() for size in sizes}
KEY = ("size", "seed", "experts", "rows", "contender", "setting")


@dataclass(frozen=True)
class Line:
    """The share of one expert's gain that one setting keeps on one split; `experts` is how many are merged."""

    size: str
    seed: int
    experts: int
    rows: int
    contender: str
    setting: str
    split: str
    task: str
    kept: float


@dataclass(frozen=True)
class Asked:
    """A setting to judge: what its line says of it, and the task that is merged alone, "" for all."""

    contender: str
    variant: Variant
    alone: str = ""


def read_flags(doc: str | None, results: Path) -> argparse.Namespace:
    """The flags that all benchmarks of settings have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and mbpp/; default: the offline example's text")
    parser.add_argument("--size", choices=tuple(TRAININGS), default="small")
    parser.add_argument("--seeds", default="0", help="by comma")
    parser.add_argument("--experts", type=int, default=2, help="how many are merged; 3: with a third task")
    parser.add_argument("--rows", default=str(CALIBRATION_SAMPLES), help="calibration rows a task, by comma")
    parser.add_argument("--only", help="only contenders that begin with one of these words, by semicolon")
    parser.add_argument("--first", type=int, help="only so many settings, those that decide first")
    parser.add_argument("--work", type=Path, default=Path("output/quality"), help="the folder of benchmarks/quality.py")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def judge_settings(asked: argparse.Namespace, settings: Sequence[Asked], name: str) -> bool:
    """Judge all settings on all seeds and numbers of rows, as far as the file has no line of them; whether all went well.

    `name` is of the folder in which the pair is measured for these settings.
    """
    from utils.merging.guided.methods import register_methods

    register_methods()
    sheet, is_well = Sheet(asked.results, Line, KEY), True
    wanted = tuple(word.strip() for word in asked.only.split(";")) if asked.only else ("",)
    for seed in map(int, asked.seeds.split(",")):
        for rows in map(int, asked.rows.split(",")):
            judge = _judge(asked, seed, rows, name)
            for one in [one for one in settings if one.contender.startswith(wanted)][: asked.first]:
                key = (
                    asked.size,
                    seed,
                    asked.experts if not one.alone else 1,
                    rows,
                    one.contender,
                    one.variant.setting,
                )
                if sheet.has(**dict(zip(KEY, key, strict=True))):
                    continue
                try:
                    sheet.add(*_lines(judge, one, key, asked.device))
                except Exception:  # one setting that fails must not cost the figures of all others
                    traceback.print_exc()
                    is_well = False
                else:
                    print(*key, file=sys.stderr, flush=True)
    return is_well


def _judge(asked: argparse.Namespace, seed: int, rows: int, name: str) -> Judge:
    training, work = TRAININGS[asked.size], asked.work.resolve()
    piece = Piece(asked.size, training, seed, asked.experts, asked.data, work, asked.device, ROWS)
    trained, texts = models_and_texts(piece)
    texts = with_more_calibration(texts, rows, asked.data, seed)
    pair = lay_out(trained, texts, pair_folder(piece, trained) / name / f"{rows}", samples=rows)
    return Judge(pair, texts, ROWS, asked.device)


def _lines(judge: Judge, one: Asked, key: tuple, device: str) -> Iterator[Line]:
    found = judge.split_losses(one.variant.recipe(judge.pair, device), (VALIDATION, TEST))
    for split, losses in found.items():
        for task, kept in shares_kept(judge, losses, split).items():
            if one.alone in ("", task):
                yield Line(*key, split, task, kept)
