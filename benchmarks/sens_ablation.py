"""Sens-Merging's parts, temperatures and plug-ins on the quality benchmark's pairs: what each is worth.

    python3 benchmarks/sens_ablation.py --data DATA --seeds 2
    python3 benchmarks/sens_ablation.py --data DATA --seeds 2 --work output/quality     # the quality benchmark's models

Per seed the small pair is trained or found, sensitivities are measured once, and every recipe is scored on validation and on
test text by the evaluator's functions. Shown are the share of the experts' gain kept (mean of the tasks) and its paired
difference to the same merge with uniform weights. Writes `sens_ablation.md` and `.csv` into `benchmarks/results/`.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.held_out import HeldOut, mean_and_interval
from benchmarks.quality_contenders import Variant, guided, plain
from benchmarks.quality_models import SMALL
from benchmarks.quality_seed import prepare
from benchmarks.sweep_flags import sweep_flags
from utils.errors import run_command
from utils.evaluation.tasks import TEST, VALIDATION

RESULTS = Path(__file__).resolve().parent / "results"
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 3.0)
SOME = (0.1, 1.0)  # for what does not need them all
LAMBDA = 0.3
CUT = {"mean_density": 0.5, "lambda": 0.35}


def contenders() -> dict[str, tuple[str, Variant]]:
    """By name, the uniform merge to compare with and the recipe; a uniform merge is compared with itself."""

    def sens(**flags):
        return guided("sens_merging", **flags)

    plugins = {
        "task arithmetic": (plain("task_arithmetic", weight=1.0, scale=LAMBDA), {"lambda": LAMBDA}),
        "TIES": (plain("ties", weight=1.0, density=0.5, scale=0.35), {"merge_method": "ties", **CUT}),
        "DARE": (plain("dare_linear", weight=1.0, density=0.5, scale=0.35), {"merge_method": "dare_linear", **CUT}),
    }
    found = {f"{name}, uniform": (f"{name}, uniform", variant) for name, (variant, _) in plugins.items()}
    for name, (_, flags) in plugins.items():
        for factors in ("both", "sensitivity", "scaling"):
            found[f"{name}, {factors}, temperature {SOME[0]:g}"] = (
                f"{name}, uniform",
                sens(**flags, factors=factors, temperature=SOME[0]),
            )
    for temperature in TEMPERATURES:
        options = [{}] + ([{"alignment": "similarity"}, {"outside": "layers"}] if temperature in SOME else [])
        for more in options:
            name = ", ".join(["task arithmetic, both", *more.values(), f"temperature {temperature:g}"])
            found[name] = (
                "task arithmetic, uniform",
                sens(**{"lambda": LAMBDA, "temperature": temperature, **more}),
            )
    return found


def main() -> None:
    """Score every contender on every seed, then report."""
    asked = sweep_flags(__doc__, RESULTS)
    rows = [row for seed in range(asked.seeds) for row in _one_seed(seed, asked.data, asked.work.resolve())]
    with (asked.results / "sens_ablation.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "contender", "part", "task", "share"))
        writer.writerows(rows)
    text = markdown(rows)
    (asked.results / "sens_ablation.md").write_text(text, encoding="utf-8")
    print(text)


def _one_seed(seed: int, data: Path | None, work: Path) -> list[tuple[int, str, str, str, float]]:
    pair, texts = prepare(SMALL, seed, data, work, "cpu")
    recipes = {name: variant.recipe(pair, "cpu") for name, (_, variant) in contenders().items()}
    held_out = HeldOut(pair, texts)
    return [
        (seed, name, part, task, share)
        for part in (VALIDATION, TEST)
        for name, shares in held_out.shares(recipes, part).items()
        for task, share in shares.items()
    ]


def markdown(rows: list[tuple[int, str, str, str, float]]) -> str:
    """The table: share kept on validation and test, and points against the uniform merge on test."""
    by_seed: dict[tuple[str, str], dict[int, list[float]]] = {}
    for seed, name, part, _, share in rows:
        by_seed.setdefault((name, part), {}).setdefault(seed, []).append(share)
    means = {key: {seed: sum(own) / len(own) for seed, own in one.items()} for key, one in by_seed.items()}
    lines = ["| merge | kept, validation | kept, test | points against uniform, test |", "|---|---|---|---|"]
    for name, (against, _) in contenders().items():
        shown = [mean_and_interval(list(means[name, part].values()))[0] for part in (VALIDATION, TEST)]
        pairs = [100 * (value - means[against, TEST][seed]) for seed, value in means[name, TEST].items()]
        mean, half = mean_and_interval(pairs)
        shown_half = f" ± {half:.2f}" if half < float("inf") else ""
        difference = "the control" if name == against else f"{mean:+.2f}{shown_half}"
        lines.append(f"| {name} | {shown[0]:.1%} | {shown[1]:.1%} | {difference} |")
    seeds = len({row[0] for row in rows})
    how = "one seed of the small pair" if seeds == 1 else f"{seeds} seeds of the small pair; ±: 95 % interval, paired"
    return "\n".join([*lines, "", f"{how}; λ 0.3 for task arithmetic, else 0.35 at density 0.5.", ""])


if __name__ == "__main__":
    run_command(main)
