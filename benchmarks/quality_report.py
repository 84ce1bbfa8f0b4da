"""The quality benchmark's figures as tables, words and one picture; pure functions of its rows, apart from files.

    python3 benchmarks/quality_report.py benchmarks/results/peers/quality.csv      # the tables beside it, anew

A row is one merge judged on one task's test text. `one expert`: the expert's own task, with a budget. `two experts`, `three
experts`: one row per task, no budget. What is compared is the mean over tasks of a seed; the minimum over tasks is shown beside.
"""

import csv
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality_losses import mean_and_least
from benchmarks.quality_statistics import Interval, by_seed, paired_interval, verdict

ONE, TWO, THREE = "one expert", "two experts", "three experts"


@dataclass(frozen=True)
class Figure:
    """One merge on one task. `setting` says what validation chose; `other_loss` is the mean loss on the other texts."""

    experiment: str
    size: str
    seed: int
    contender: str
    budget: float | None
    task: str
    kept: float
    own_loss: float
    other_loss: float | None
    setting: str


@dataclass(frozen=True)
class Comparison:
    """One contender against its control: share kept (mean and minimum over tasks, averaged over seeds) and interval."""

    experiment: str
    size: str
    budget: float | None
    contender: str
    kept: float
    least: float
    interval: Interval | None

    @property
    def words(self) -> str:
        """The verdict; the control has none."""
        return "the control" if self.interval is None else verdict(self.interval)


def compare(figures: Sequence[Figure], controls: Mapping[str, str]) -> list[Comparison]:
    """Compare every contender with the control of its experiment at the same size and budget, paired by seed.

    Of a run that was cut, a contender counts on the seeds that have all tasks of its experiment; one that has no such seed,
    or whose control has none, is left out.

    Args:
        figures: each (experiment, size, budget, contender, seed) once per task.
        controls: the contender that is the control, by experiment.

    Raises:
        ValueError: a contender and its control have no seed in common, or a row occurs twice.
    """
    shares: dict[tuple, dict[tuple[int, str], float]] = {}
    tasks: dict[str, set[str]] = {}
    for figure in figures:
        tasks.setdefault(figure.experiment, set()).add(figure.task)
        place = shares.setdefault((figure.experiment, figure.size, figure.budget, figure.contender), {})
        if (figure.seed, figure.task) in place:
            raise ValueError(f"{figure.contender}: seed {figure.seed}, {figure.task} occurs twice")
        place[figure.seed, figure.task] = figure.kept
    found = []
    for (experiment, size, budget, contender), own in shares.items():
        control = shares.get((experiment, size, budget, controls[experiment]))
        if control is None:
            continue
        if not own.keys() & control.keys():
            raise ValueError(f"{contender} and {controls[experiment]} were not run on the same tasks of any seed")
        seeds = {seed for seed, _ in own if _tasks(own, seed) == _tasks(control, seed) == tasks[experiment]}
        if not seeds:
            continue
        rows, control_rows = (
            _seed_rows({key: kept for key, kept in part.items() if key[0] in seeds}) for part in (own, control)
        )
        interval = paired_interval(by_seed(rows, "mean"), by_seed(control_rows, "mean"))
        found.append(
            Comparison(
                experiment,
                size,
                budget,
                contender,
                statistics.fmean(row["mean"] for row in rows),
                statistics.fmean(row["least"] for row in rows),
                None if contender == controls[experiment] else interval,
            )
        )
    return found


def markdown(comparisons: Iterable[Comparison]) -> str:
    """One Markdown table per experiment and size."""
    tables: dict[tuple[str, str], list[str]] = {}
    for row in comparisons:
        lines = tables.setdefault((row.experiment, row.size), [])
        place = [] if row.budget is None else [f"{row.budget:g}"]
        cells = [*place, row.contender, f"{row.kept:.1%}", f"{row.least:.1%}", row.words]
        lines.append("| " + " | ".join(cells) + " |")
    parts = []
    for (experiment, size), lines in tables.items():
        heads = ["density"] * (experiment == ONE) + [
            "contender",
            "gain kept, mean",
            "least of the tasks",
            "against the control",
        ]
        head = "| " + " | ".join(heads) + " |\n|" + "---|" * len(heads)
        parts.append("\n".join([f"**{experiment}, {size}**", "", head, *lines]))
    return "\n\n".join(parts)


def read_figures(path: Path) -> list[Figure]:
    """The rows of a CSV that `write_figures` wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        return [_figure(row) for row in csv.DictReader(file)]


def _figure(row: Mapping[str, str]) -> Figure:
    numbers = {"seed": int, "budget": float, "kept": float, "own_loss": float, "other_loss": float}
    return Figure(
        **{key: (numbers.get(key, str)(value) if value or key == "setting" else None) for key, value in row.items()}
    )


def write_figures(path: Path, figures: Sequence[Figure]) -> None:
    """Write all rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Figure)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(figure) for figure in figures)


def draw(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Two panels per size: gain kept against density, and each two-expert method's difference with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(row.size for row in comparisons))
    figure, panels = plt.subplots(
        len(sizes), 2, figsize=(12, 4.6 * len(sizes)), layout="constrained", squeeze=False, width_ratios=(1, 1.1)
    )
    for size, (left, right) in zip(sizes, panels, strict=True):
        own = [row for row in comparisons if row.size == size]
        _draw_budgets(left, [row for row in own if row.experiment == ONE])
        _draw_differences(right, [row for row in own if row.experiment == TWO and row.interval is not None])
        left.set_title(f"one expert, {size}")
        right.set_title(f"two experts, {size}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _draw_budgets(axes, rows: Sequence[Comparison]) -> None:
    for contender in dict.fromkeys(row.contender for row in rows):
        own = sorted((row for row in rows if row.contender == contender), key=lambda row: row.budget)
        dashed = "--" if all(row.interval is None for row in own) else "-"
        axes.plot([row.budget for row in own], [100 * row.kept for row in own], "o" + dashed, label=contender, ms=4)
    axes.axhline(100, color="gray", lw=0.8)
    axes.set(xlabel="share of the change that is kept", ylabel="% of the expert's gain kept", xscale="log")
    budgets = sorted({row.budget for row in rows})
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.minorticks_off()
    if rows:
        axes.legend(loc="lower right", fontsize=8)


def _draw_differences(axes, rows: Sequence[Comparison]) -> None:
    rows = sorted(rows, key=lambda row: row.interval.mean)
    for place, row in enumerate(rows):
        low, high = (100 * max(min(end, 10.0), -10.0) for end in (row.interval.low, row.interval.high))
        better = row.interval.low > 0
        color, mark = ("tab:blue", "^") if better else ("tab:orange", "v")
        color, mark = (color, mark) if row.interval.excludes_zero else ("gray", "o")
        axes.plot([low, high], [place, place], color=color, lw=2)
        axes.plot([100 * row.interval.mean], [place], mark, color=color)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.contender for row in rows], fontsize=8)
    axes.set_xlabel("points of gain kept more than the best uniform merge (95 % interval)")


def _tasks(shares: Mapping[tuple[int, str], float], seed: int) -> set[str]:
    return {task for own, task in shares if own == seed}


def _seed_rows(shares: Mapping[tuple[int, str], float]) -> list[dict[str, float]]:
    rows = []
    for seed in sorted({seed for seed, _ in shares}):
        mean, least = mean_and_least({task: value for (own, task), value in shares.items() if own == seed})
        rows.append({"seed": seed, "mean": mean, "least": least})
    return rows


def main() -> None:
    """Write the tables of files of figures beside them."""
    from benchmarks.quality_contenders import CONTROLS

    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".md").write_text(markdown(compare(read_figures(path), CONTROLS)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
