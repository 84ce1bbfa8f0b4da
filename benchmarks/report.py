"""Tables and plots from the runs that the benchmarks wrote.

    python3 benchmarks/report.py

Reads `measuring.csv`, `merging.csv` and `mixtures.csv` in `benchmarks/results/` (`--results` for another folder). Prints Markdown tables
ready for a README: every contender with its baselines, and how cost grows. Writes the same into `summary.md` beside the
CSVs, and draws cost against model size and against tokens (`cost_by_size.png`, `cost_by_samples.png`; those of a GPU have
`_cuda` in the name).
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

from benchmarks import mixtures
from benchmarks.growth import ENOUGH, Growth, fit

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES = ["seconds", "job_seconds", "anonymous", "gpu", "tokens", "processor"]
# what each contender is compared with, by benchmark
BASELINES = {
    "measuring": {
        "ours": ("published", "read-floor"),
        "parity": ("published-fp32",),
        "parity-fast": ("published",),
        "gram_mean": ("ours",),
    },
    "merging": {
        "ours": ("mergekit-yaml", "mergekit-fast-options", "floor"),
        "ours-stock": ("mergekit-yaml",),
        "ours-gpu": ("mergekit-yaml", "mergekit-fast-options", "floor"),
        "ours-cpu": ("mergekit-yaml", "mergekit-fast-options", "floor"),
    },
}
NAMES = {
    "ours": "defaults",
    "parity": "`parity: reference`, float32",
    "parity-fast": "`parity: reference`, bfloat16",
    "gram_mean": "`gram_mean`",
    "published": "published procedure, bfloat16",
    "published-fp32": "published procedure, float32",
    "read-floor": "reading the weights to the device",
    "ours-stock": "`--fast_selection False`",
    "ours-gpu": "`--device cuda`",
    "ours-cpu": "`--device cpu`",
    "mergekit-yaml": "stock `mergekit-yaml`",
    "mergekit-fast-options": "stock, its fastest options",
    "floor": "reading the inputs, writing the output",
}
OURS = ": ours"
STYLES = (("tab:blue", "o", "-"), ("tab:orange", "s", "--"), ("tab:gray", "^", "-."), ("black", "v", ":"))
HEADING = ["what", "baseline", "job s, ours / baseline", "job, times faster", "process s, ours / baseline"]
HEADING += ["process, times faster", "unreclaimable MB, ours / baseline"]
ON_GPU = "GPU MB, ours / baseline"


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    """Median of every figure per machine, what was run on, and contender; with the number of runs."""
    figures = [name for name in FIGURES if name in frame]
    keys = [column for column in frame.columns if column not in figures]
    grouped = frame.groupby(keys, sort=False, dropna=False)[figures]
    return grouped.median().assign(runs=grouped.size()).reset_index()


def compared(table: pd.DataFrame, baselines: dict[str, tuple[str, ...]]) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Every contender with each of its baselines that ran on the same machine on the same work."""
    work = [column for column in table.columns if column not in (*FIGURES, "runs", "contender")]
    for _, same in table.groupby(work, sort=False, dropna=False):
        rows = {row["contender"]: row for _, row in same.iterrows()}
        for name, others in baselines.items():
            yield from ((rows[name], rows[other]) for other in others if name in rows and other in rows)


def comparison(kind: str, table: pd.DataFrame) -> str:
    """A Markdown table of ours against the baselines: medians and how many times faster."""
    memory = {"anonymous": HEADING[-1]} | ({"gpu": ON_GPU} if table["gpu"].any() else {})
    heading = [*HEADING[:-1], *memory.values(), "runs"]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for ours, base in compared(table, BASELINES[kind]):
        cells = [what(kind, ours), NAMES[base["contender"]]]
        for name in ("job_seconds", "seconds"):
            cells += [f"{ours[name]:.1f} / {base[name]:.1f}", f"{base[name] / ours[name]:.1f}"]
        cells += [f"{ours[name] / 1e6:.0f} / {base[name] / 1e6:.0f}" for name in memory]
        lines.append("| " + " | ".join([*cells, f"{min(ours['runs'], base['runs'])}"]) + " |")
    return "\n".join(lines)


def what(kind: str, row: pd.Series) -> str:
    """What was measured or merged, in a few words."""
    name, size = NAMES[row["contender"]], f"{row['params'] / 1e6:.0f} M"
    if kind == "measuring":
        return f"measuring a pair, {size}, {row['nsamples']} {str(row['text']).upper()} samples, {name}"
    cache = "" if row["cache"] == "warm" else f", {row['cache']} page cache"
    return f"merging two experts, {size}, `{row['method']}` in {row['dtype']}{cache}, {name}"


def series(kind: str, table: pd.DataFrame, against: str, enough: int = ENOUGH) -> dict[str, pd.DataFrame]:
    """The series of one contender over at least `enough` sizes (`params` or `tokens`), by what is the same in them."""
    figures = {*FIGURES, "runs", "machine", against}
    paired = {"params": {"shape"}, "tokens": {"nsamples", "tokens"}}[against]
    keys = [column for column in table.columns if column not in figures | paired]
    found = {}
    for _, rows in table.groupby(keys, sort=False, dropna=False):
        rows = rows[rows[against] > 0].sort_values(against)
        if rows[against].nunique() >= enough:
            found[label(kind, rows.iloc[0], against)] = rows
    return found


def label(kind: str, row: pd.Series, against: str) -> str:
    """What to call a series."""
    if kind == "merging":
        return f"merging two experts, {row['method']}, cache {row['cache']}: {row['contender']}"
    same = (
        f"{row['nsamples']} {row['text']} samples"
        if against == "params"
        else f"{row['params'] / 1e6:.0f} M, {row['text']}"
    )
    return f"measuring a pair, {same}: {row['contender']}"


def growth(rows: pd.DataFrame, against: str) -> Growth:
    """The line through a series."""
    return fit(list(rows[against].astype(float)), list(rows["job_seconds"].astype(float)))


def draw(path: Path, found: dict[str, list[pd.DataFrame]], against: str) -> None:
    """Job seconds of several series against a size: ours and its baselines in one panel, each with its line.

    The line of what ran at fewer than three sizes is in proportion to the largest, which the legend says.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    unit, title = {"params": (1e6, "million parameters"), "tokens": (1e3, "thousand tokens")}[against]
    figure, panels = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.0), layout="constrained", squeeze=False)
    for axes, (name, drawn) in zip(panels[0], found.items(), strict=True):
        end = max(float(rows[against].max()) for rows in drawn)
        for rows, (color, mark, dash) in zip(drawn, STYLES, strict=False):
            what = NAMES[rows["contender"].iloc[0]].replace("`", "")
            if rows[against].nunique() >= ENOUGH:
                line = growth(rows, against)
                start, slope = line.at(0), line.slope
                text = f"{what}: {start:.2f} s + {slope * unit:.3g} s per {title.split()[0]}"
            else:
                start, slope = 0.0, float(rows["job_seconds"].iloc[-1] / rows[against].iloc[-1])
                text = f"{what}, in proportion: {slope * unit:.3g} s per {title.split()[0]}"
            axes.plot(rows[against] / unit, rows["job_seconds"], mark, color=color)
            axes.plot([0, end / unit], [start, start + slope * end], dash, color=color, label=text)
        axes.set(xlabel=title, ylabel="seconds, start-up apart", xlim=(0, None), ylim=(0, None))
        axes.set_title(textwrap.fill(name, 60), fontsize=9)
        axes.legend(loc="upper left", fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def with_baselines(kind: str, table: pd.DataFrame, against: str) -> dict[str, list[pd.DataFrame]]:
    """Our series by what they are, each with those of its baselines that ran the same work at any size."""
    every = series(kind, table, against, enough=1)
    return {
        name.removesuffix(OURS): [
            rows,
            *(
                every[other]
                for base in BASELINES[kind]["ours"]
                if (other := f"{name.removesuffix(OURS)}: {base}") in every
            ),
        ]
        for name, rows in series(kind, table, against).items()
        if name.endswith(OURS)
    }


def report(results: Path, say: Callable[[str], None]) -> list[Path]:
    """Write `summary.md` and the pictures; `say` gets every line of the summary."""
    lines: list[str] = []
    pictures: dict[tuple[str, str], dict[str, list[pd.DataFrame]]] = {}
    for kind in BASELINES:
        path = results / f"{kind}.csv"
        if not path.exists():
            print(f"{path} is not there; run benchmarks/{kind}.py first", file=sys.stderr)
            continue
        for (machine, device), table in medians(pd.read_csv(path)).groupby(["machine", "device"], sort=False):
            lines += [f"\n{kind.capitalize()} on {machine}, device {device}:\n", comparison(kind, table), ""]
            for against, unit, per in (("params", "100 M parameters", 1e8), ("tokens", "1000 tokens", 1e3)):
                if against not in table or (kind, against) == ("merging", "tokens"):
                    continue
                found = series(kind, table, against)
                lines += [f"- {name}: {growth(rows, against).sentence(unit, per)}." for name, rows in found.items()]
                picture = {"params": "cost_by_size", "tokens": "cost_by_samples"}[against]
                place = "" if str(device) == "cpu" else f"_{str(device).partition(':')[0]}"
                pictures.setdefault((f"{picture}{place}.png", against), {}).update(with_baselines(kind, table, against))
    if (path := results / "mixtures.csv").exists():
        lines += mixtures.summary(pd.read_csv(path))
    summary = results / "summary.md"
    summary.write_text("\n".join(lines).strip() + "\n", encoding="utf-8")
    for line in lines:
        say(line)
    for (name, against), found in pictures.items():
        if found:
            draw(results / name, found, against)
    return [summary, *(results / name for (name, _), found in pictures.items() if found)]


def main() -> None:
    """Print the tables and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    for path in report(parser.parse_args().results, print):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
