"""How much of an expert's gain is left at every mean density: uniform, LEWIS and saliency, from one measurement each.

    python3 benchmarks/budget_sweep.py --data DATA --seeds 2
    python3 benchmarks/budget_sweep.py --data DATA --seeds 2 --work output/quality      # the quality benchmark's models

Each expert of the small pair is merged alone onto the base by TIES at mean densities from 0.05 to 1, and scored on test text
by the evaluator's functions; no merged model is written. Writes `budget_sweep.csv` and `.png` into `benchmarks/results/`.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.held_out import HeldOut
from benchmarks.quality_contenders import Variant, guided
from benchmarks.quality_models import SMALL
from benchmarks.quality_seed import prepare
from benchmarks.sweep_flags import sweep_flags
from utils.errors import run_command
from utils.evaluation.tasks import TEST

RESULTS = Path(__file__).resolve().parent / "results"
DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def contenders(task: str, density: float) -> dict[str, Variant]:
    """The recipes at a mean density."""
    keep = {"config": task, "mean_density": density}
    return {
        "uniform": guided("lewis", number=1, control="uniform", **keep),
        "LEWIS": guided("lewis", control="uniform", **keep),
        "saliency budget": guided("saliency_budget", **keep),
        "saliency mask": guided("saliency_budget", mask="saliency", **keep),
    }


def main() -> None:
    """Score the sweep on every seed, then write the table and the figure."""
    asked = sweep_flags(__doc__, RESULTS)
    rows = [row for seed in range(asked.seeds) for row in _one_seed(seed, asked.data, asked.work.resolve())]
    with (asked.results / "budget_sweep.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "task", "density", "contender", "share"))
        writer.writerows(rows)
    (asked.results / "budget_sweep.png").write_bytes(picture(rows))
    for line in table(rows):
        print(line)


def _one_seed(seed: int, data: Path | None, work: Path) -> list[tuple[int, str, float, str, float]]:
    from utils.merging.guided.methods import register_methods

    register_methods()
    pair, texts = prepare(SMALL, seed, data, work, "cpu")
    held_out, rows = HeldOut(pair, texts), []
    for task in texts.tasks:
        recipes = {
            (density, name): variant.recipe(pair, "cpu")
            for density in DENSITIES
            for name, variant in contenders(task, density).items()
        }
        shares = held_out.shares(
            {f"{name} {density}": own for (density, name), own in recipes.items()}, TEST, only=task
        )
        rows += [(seed, task, density, name, shares[f"{name} {density}"][task]) for density, name in recipes]
    return rows


def _means(rows: list[tuple[int, str, float, str, float]]) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, list[float]]] = {}
    for _, _, density, name, share in rows:
        found.setdefault(name, {}).setdefault(density, []).append(share)
    return {name: {density: sum(own) / len(own) for density, own in one.items()} for name, one in found.items()}


def table(rows: list[tuple[int, str, float, str, float]]) -> list[str]:
    """Markdown: a row per contender, a column per density, means over tasks and seeds."""
    lines = ["| mean density | " + " | ".join(f"{density:g}" for density in DENSITIES) + " |"]
    lines.append("|---" * (len(DENSITIES) + 1) + "|")
    for name, one in _means(rows).items():
        lines.append(f"| {name} | " + " | ".join(f"{one[density]:.1%}" for density in DENSITIES) + " |")
    return lines


def picture(rows: list[tuple[int, str, float, str, float]]) -> bytes:
    """The figure: share of the gain kept over the mean density, a line per contender."""
    import pandas as pd

    from utils.plots import curves

    wide = 100 * pd.DataFrame(_means(rows))
    seeds = len({row[0] for row in rows})
    title = f"one expert merged onto its base by TIES: mean over tasks, {'one seed' if seeds == 1 else f'{seeds} seeds'}, test text"
    return curves(wide.sort_index(), title, "mean density", "share of the expert's gain kept, %")


if __name__ == "__main__":
    run_command(main)
