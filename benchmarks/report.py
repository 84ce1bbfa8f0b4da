"""Medians, ratios and plots from the runs that the benchmarks wrote.

    python3 benchmarks/report.py

Reads `benchmarks/results/measuring.csv` and `merging.csv`, prints one Markdown table per file, and draws cost against
model size and against samples into `benchmarks/results/*.png`.
"""

import sys
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results"
BASELINES = {"ours": "published", "parity-fast": "published", "parity": "published-fp32"}
PARAMETERS = {"llama-78m": 84e6, "llama-160m": 162e6, "llama-365m": 349e6}


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    """Median of every figure per machine, what was run on, and contender; with the number of runs."""
    figures = ["seconds", "job_seconds", "anonymous", "gpu"]
    keys = [column for column in frame.columns if column not in figures]
    grouped = frame.groupby(keys, sort=False, dropna=False)[figures]
    return grouped.median().assign(runs=grouped.size()).reset_index()


def with_ratios(table: pd.DataFrame, baselines: dict[str, str]) -> pd.DataFrame:
    """Add how many times less time each contender took than its baseline (job, start-up apart; and whole process)."""
    keys = [column for column in ("machine", "shape", "text", "nsamples", "cache", "recipe") if column in table]
    rows = []
    for row in table.to_dict("records"):
        same = (table[keys] == pd.Series({key: row[key] for key in keys})).all(axis=1)
        base = table[same & (table["contender"] == baselines.get(row["contender"]))]
        for name in ("job_seconds", "seconds"):
            row[f"{name}_ratio"] = float(base[name].iloc[0]) / row[name] if len(base) else None
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, columns: dict[str, str]) -> str:
    """A Markdown table of some columns under new names."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in table.to_dict("records"):
        lines.append("| " + " | ".join(_cell(key, row[key]) for key in columns) + " |")
    return "\n".join(lines)


def draw(table: pd.DataFrame) -> list[Path]:
    """Job seconds of `ours` against parameters and against samples; the line is proportional cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ours = table[(table["contender"] == "ours") & (table["text"] == "gsm8k")]
    sizes = ours[ours["nsamples"] == 15].assign(x=lambda rows: rows["shape"].map(PARAMETERS) / 1e6)
    most_sampled = ours.groupby("shape")["nsamples"].nunique().idxmax()
    samples = ours[ours["shape"] == most_sampled].assign(x=lambda rows: rows["nsamples"])
    written = []
    for name, rows, label in (
        ("cost_by_size", sizes, "million parameters (15 samples)"),
        ("cost_by_samples", samples, f"samples ({most_sampled})"),
    ):
        rows = rows.dropna(subset="x").sort_values("x")
        figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
        axes.plot(rows["x"], rows["job_seconds"], "o-", label="measuring a pair")
        last = rows.iloc[-1]
        line = [0, last["x"]], [0, last["job_seconds"]]
        axes.plot(*line, "--", color="gray", label="proportional to the largest")
        axes.set(xlabel=label, ylabel="seconds, start-up apart", ylim=(0, None))
        axes.legend(loc="upper left")
        path = RESULTS / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written


def _cell(name: str, value: object) -> str:
    if value is None or value != value:
        return "-"
    if name == "anonymous" or name == "gpu":
        return f"{float(value) / 1e6:.0f}"
    if name.endswith("_ratio"):
        return f"{float(value):.1f}x"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Print the tables and draw the plots."""
    shown = {
        "shape": "shape",
        "text": "text",
        "nsamples": "samples",
        "cache": "page cache",
        "contender": "contender",
        "job_seconds": "job s",
        "seconds": "process s",
        "job_seconds_ratio": "job, times faster",
        "seconds_ratio": "process, times faster",
        "anonymous": "unreclaimable MB",
        "runs": "runs",
    }
    baselines = {
        "measuring": BASELINES,
        "merging": {"ours": "mergekit-yaml", "ours-stock": "mergekit-yaml", "mergekit-fast-options": "mergekit-yaml"},
    }
    for name, chosen in baselines.items():
        path = RESULTS / f"{name}.csv"
        if not path.exists():
            print(f"{path} is not there; run benchmarks/{name}.py first", file=sys.stderr)
            continue
        table = with_ratios(medians(pd.read_csv(path)), chosen)
        for machine, part in table.groupby("machine", sort=False):
            print(f"\n{name} on {machine}:\n")
            print(markdown(part, {key: title for key, title in shown.items() if key in part}))
        if name == "measuring":
            print("\n" + ", ".join(str(picture) for picture in draw(table)))


if __name__ == "__main__":
    main()
