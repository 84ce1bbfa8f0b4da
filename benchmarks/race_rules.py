"""How many losses a race reads and what its winner lacks, by its rule: races replayed on tables of losses.

    python3 benchmarks/race_rules.py --models output/quality/models/192x8_seed* --data DATA --work output/race_rules

A folder of models holds a base, experts named as their text, and nothing else (`benchmarks/quality_models.py` trains such);
`--data` holds `NAME/test.jsonl` of each text. All of 32 uniform merges (`benchmarks/searching.py`) read all 2 x 64 rows, which
is kept in `--work`; then races are replayed on each table, the rows drawn in 100 orders, for every rule: rows a task in the
first round, margin in points of gain kept, objective, and whether use is made of what base and experts lose on each row
(`utils/searching/row_means.py`). `benchmarks/results/race_rules.csv` holds one line a table and rule: losses read, candidates a
round, how far the winner is behind the best of all rows, and how often a paired test on all rows (5 %) sees that.
"""

import argparse
import csv
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.shapes import ROOT
from utils.searching import racing
from utils.searching.objective import Objective
from utils.searching.row_means import Rows

if TYPE_CHECKING:
    from utils.commands.search_setup import Prepared
    from utils.searching.recipes import Made

CANDIDATES, ROWS, ORDERS = 32, 64, 100
TIED = 0.05  # level of the paired test on all rows
FIRST_ROWS, MARGINS, OBJECTIVES = (4, 6, 8), (0.0, 0.5, 1.0), ("mean", "worst")
KNOWN = (True, False)
RESULTS = ROOT / "benchmarks" / "results" / "race_rules.csv"


@dataclass(frozen=True)
class Table:
    """Losses of all candidates on all rows: `nll` [candidates, rows], `base` [rows], `scales` [tasks] of gains."""

    nll: np.ndarray
    base: np.ndarray
    rows: Rows
    scales: np.ndarray

    @classmethod
    def of_search(cls, ready: "Prepared", made: "Sequence[Made]") -> "Table":
        """The table of recipes that have read every validation row of a search."""
        yardstick, losses = ready.yardstick, ready.losses
        task = np.repeat(np.arange(len(yardstick.rows)), [len(own) for own in yardstick.rows.values()])
        return cls(
            losses.table([one.digest for one in made], yardstick.rows),
            losses.table([yardstick.base], yardstick.rows)[0],
            Rows(task, losses.sizes(yardstick.base, yardstick.rows), np.concatenate(list(yardstick.known.values()))),
            yardstick.scales,
        )

    def save(self, path: Path) -> None:
        """Write it as .npz."""
        rows = {name: values for name, values in asdict(self.rows).items() if values is not None}
        np.savez(path, nll=self.nll, base=self.base, scales=self.scales, **rows)

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read what `save` wrote."""
        with np.load(path) as held:
            rows = Rows(held["task"], held["tokens"], held.get("known"))
            return cls(held["nll"], held["base"], rows, held["scales"])

    @property
    def per_task(self) -> np.ndarray:
        """Rows of each task."""
        return np.bincount(self.rows.task, minlength=len(self.scales))

    def part(self, candidates: np.ndarray, places: np.ndarray) -> "Table":
        """Some candidates on some rows."""
        return Table(self.nll[np.ix_(candidates, places)], self.base[places], self.rows.part(places), self.scales)

    def figure(self, objective: Objective) -> np.ndarray:
        """Each candidate's figure on all rows."""
        return objective.figure(racing.gains(self.nll, self.rows, self.base, self.scales))

    def beaten(self, objective: Objective, **rule: object) -> np.ndarray:
        """Which candidates the best one beats on these rows (`racing.beaten`)."""
        return racing.beaten(self.nll, self.rows, self.base, self.scales, objective, **rule)

    def tied(self, winner: int, objective: Objective) -> bool:
        """Whether a paired test on all rows does not see that a candidate is behind the best one."""
        best = int(self.figure(objective).argmax())
        two = self.part(np.array([best, winner]), np.arange(len(self.base)))
        return best == winner or not two.beaten(objective, level=TIED)[1]


@dataclass(frozen=True)
class Replayed:
    """One line of the results: what the races of a rule on a table came to, on average over the orders of rows.

    `margin`, `behind` and `most_behind` are in points of gain kept; `known` says whether use is made of what base and experts
    lose; `rounds` counts candidates that entered a round, which is how often a candidate is merged.
    """

    table: str
    objective: str
    first_rows: int
    margin: float
    known: bool
    losses_read: float
    of: int
    rounds: float
    other_winner: float
    behind: float
    most_behind: float
    tied: float


def race(
    table: Table, order: Sequence[np.ndarray], objective: Objective, first: int, margin: float, known: bool = True
) -> tuple[int, int, int]:
    """A race of all candidates; `order` are the places of each task's rows. Its winner, losses read, merges."""
    whole = table.rows if known else replace(table.rows, known=None)
    alive, read, merges, before = np.arange(len(table.nll)), 0, 0, 0
    there = tuple(map(len, order))
    for seen in racing.schedule(there, first):
        places = np.concatenate([own[:count] for own, count in zip(order, seen, strict=True)])
        read, merges, before = read + len(alive) * (len(places) - before), merges + len(alive), len(places)
        if tuple(seen) != there:
            alive = alive[~table.part(alive, places).beaten(objective, whole=whole, margin=margin)]
    return int(alive[table.figure(objective)[alive].argmax()]), read, merges


def replay(name: str, table: Table, kind: str, first: int, margin: float, known: bool = True) -> Replayed:
    """Race in many orders of rows under one rule; `margin` in points."""
    tasks = tuple(map(str, range(len(table.scales))))
    objective, rng = Objective.of(kind, tasks, {}), np.random.default_rng(0)  # the same orders for all rules
    own = [np.flatnonzero(table.rows.task == task) for task in range(len(tasks))]
    figure, found = table.figure(objective), []
    for _ in range(ORDERS):
        winner, *spent = race(table, [rng.permutation(rows) for rows in own], objective, first, margin / 100, known)
        behind = 100 * float(figure.max() - figure[winner])
        found.append((*spent, behind > 0, behind, table.tied(winner, objective)))
    read, merges, other, behind, tied = (float(one) for one in np.mean(found, axis=0))
    most = max(float(one[3]) for one in found)
    line = Replayed(name, kind, first, margin, known, read, table.nll.size, merges, other, behind, most, tied)
    return replace(line, **{key: round(value, 4) for key, value in asdict(line).items() if isinstance(value, float)})


def make_table(models: Path, data: Path, work: Path) -> Table:
    """All losses of a pair's 32 uniform merges; scored once."""
    from benchmarks.search_pairs import write_pair
    from benchmarks.searching import points, search_over
    from utils.evaluation.candidates import Candidate
    from utils.searching.losses import Entrant

    kept = work / f"{models.name}.npz"
    if kept.exists():
        return Table.read(kept)
    names = sorted(one.name for one in models.iterdir() if (data / one.name / "test.jsonl").exists())
    texts = {name: {"name": name, "path": str((data / name / "test.jsonl").resolve()), "seqlen": 128} for name in names}
    folder = work / models.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = points(CANDIDATES)
    _, ready = search_over(
        write_pair(folder, {name: models / name for name in ("base", *names)}, texts), folder, known, ROWS
    )
    made = [ready.maker.make(one.point) for one in known]
    entrants = [Entrant(one.digest, Candidate(one.digest[:16], recipe=one.data)) for one in made]
    ready.losses.require(entrants, ready.yardstick.rows)
    table = Table.of_search(ready, made)
    ready.study.close()
    table.save(kept)
    shutil.rmtree(folder)
    return table


def lines(tables: dict[str, Table]) -> Iterator[Replayed]:
    """Every rule on every table."""
    for (name, table), *rule in product(tables.items(), OBJECTIVES, FIRST_ROWS, MARGINS, KNOWN):
        yield replay(name, table, *rule)


def report(found: Sequence[Replayed]) -> None:
    """Print each rule's mean over the tables."""
    for rule in product(OBJECTIVES, FIRST_ROWS, MARGINS, KNOWN):
        own = [one for one in found if (one.objective, one.first_rows, one.margin, one.known) == rule]
        kind, first, margin, known = rule
        read, merges, behind, tied = (
            np.mean([getattr(one, key) for one in own]) for key in ("losses_read", "rounds", "behind", "tied")
        )
        most = max(one.most_behind for one in own)
        print(
            f"{kind}, {first} rows first, margin {margin}{', by the experts' if known else ''}: {read:.0f} of {own[0].of} losses in {merges:.0f} merges; "
            f"{behind:.3f} points behind, {most:.2f} at most; {100 * tied:.1f} % tied"
        )


def main() -> None:
    """Make the tables, replay every rule on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of a base and its experts")
    parser.add_argument("--data", type=Path, help="a folder with NAME/test.jsonl of each expert")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="tables that are there, as .npz")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "race_rules")
    args = parser.parse_args()

    from utils.runtime import quiet_libraries

    quiet_libraries()
    tables = {path.stem: Table.read(path) for path in args.tables}
    tables |= {models.name: make_table(models, args.data, args.work) for models in args.models}
    found = list(lines(tables))
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Replayed.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(map(asdict, found))
    report(found)


if __name__ == "__main__":
    main()
