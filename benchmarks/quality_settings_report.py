"""Lines of settings as Markdown tables, each setting against the first one of its contender, or against the start.

python3 benchmarks/quality_settings_report.py benchmarks/results/gram_settings.csv     # the tables beside it
"""

import csv
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality_losses import mean_and_least
from benchmarks.quality_merges import TEST, VALIDATION
from benchmarks.quality_statistics import paired_interval, verdict

START = "start: "  # what a contender begins with from which others are tuned
HEAD = "| contender | setting | validation: mean | test: mean | the worst task | against the first, test |\n|---|---|---|---|---|---|"
Shares: TypeAlias = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Shares kept by split, seed and task."""


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """One table for each size, number of experts and number of rows; settings in the order of the file.

    Means are over tasks and seeds. Differences are paired by the seeds that both have, with 95 % intervals.
    """
    places: dict[tuple[str, ...], dict[tuple[str, str], dict]] = {}
    for row in rows:
        place = places.setdefault((row["size"], row["experts"], row["rows"]), {})
        shares = place.setdefault((row["contender"], row["setting"]), {VALIDATION: {}, TEST: {}})
        shares[row["split"]].setdefault(int(row["seed"]), {})[row["task"]] = float(row["kept"])
    tables = []
    for (size, experts, count), found in places.items():
        title = f"**{size}, {experts} expert{'s' * (experts != '1')}, {count} calibration rows a task**"
        tables.append("\n".join([title, "", HEAD, *_lines(found)]))
    return "\n\n".join(tables)


def _lines(found: Mapping[tuple[str, str], Shares]) -> Iterator[str]:
    start = next((key for key in found if key[0].startswith(START)), None)
    for (contender, setting), shares in found.items():
        control = start or next(key for key in found if key[0] == contender)
        kept = {split: statistics.fmean(_means(shares[split]).values()) for split in (VALIDATION, TEST)}
        least = statistics.fmean(mean_and_least(tasks)[1] for tasks in shares[TEST].values())
        against = "the first" if control == (contender, setting) else _against(shares, found[control])
        cells = [contender, setting, f"{kept[VALIDATION]:.1%}", f"{kept[TEST]:.1%}", f"{least:.1%}", against]
        yield "| " + " | ".join(cells) + " |"


def _against(shares: Shares, control: Shares) -> str:
    ours, others = _means(shares[TEST]), _means(control[TEST])
    both = ours.keys() & others.keys()
    if not both:
        return "no seed in common"
    return verdict(paired_interval({seed: ours[seed] for seed in both}, {seed: others[seed] for seed in both}))


def _means(by_seed: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    return {seed: mean_and_least(tasks)[0] for seed, tasks in by_seed.items()}


def main() -> None:
    """Write the tables of files of lines beside them."""
    for path in map(Path, sys.argv[1:]):
        with open(path, newline="", encoding="utf-8") as file:
            path.with_suffix(".md").write_text(markdown(list(csv.DictReader(file))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
