"""Which trials a search ends with, and its trials as a table."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from utils.recipes.method_rules import OWN_METHODS
from utils.searching.objective import Objective
from utils.searching.study import Finished, SearchStudy


@dataclass(frozen=True)
class Winners:
    """The best trial on validation rows, the best that any mergekit merges, and the uniform ones, the best first.

    All of them saw every row; `best` and `stock` may be one, and may be a uniform one: then `other` is the best that is
    none, if there is one.
    """

    best: Finished
    stock: Finished
    uniform: tuple[Finished, ...]
    front: tuple[Finished, ...] = ()
    other: Finished | None = None

    @property
    def all(self) -> tuple[Finished, ...]:
        """Each once."""
        found: dict[str, Finished] = {}
        for one in (self.best, self.stock, *self.front, *filter(None, [self.other]), *self.uniform):
            found.setdefault(one.digest, one)
        return tuple(found.values())


def choose(finished: list[Finished], objective: Objective, *, pareto: bool) -> Winners:
    """The winners of the trials that saw every row; earlier ones win ties.

    Raises:
        ValueError: there is none.
    """
    gains = np.array([[one.gains[task] for task in objective.tasks] for one in finished])
    order = np.argsort(-objective.figure(gains), kind="stable")
    ranked = [finished[place] for place in order]
    stock = [one for one in ranked if one.point.merge_method not in OWN_METHODS] or ranked
    front = [
        one
        for one, own in zip(finished, gains, strict=True)
        if pareto and not ((gains >= own).all(axis=1) & (gains > own).any(axis=1)).any()
    ]
    uniform = tuple(one for one in ranked if one.point.uniform)
    other = next((one for one in ranked if not one.point.uniform), None) if ranked[0].point.uniform else None
    return Winners(ranked[0], stock[0], uniform, tuple(front), other)


def trials_table(study: SearchStudy, objective: Objective) -> pd.DataFrame:
    """One row a trial: what was tried, how it ended, its gains by task (`gain.<task>`), the rows it saw of how many."""
    rows = []
    for place, trial in enumerate(study.trials):
        own = trial.user_attrs
        point = own.get("point", {})
        seen, there = own.get("rows", (0, 0))
        gains = [own.get("gains", {}).get(task) for task in objective.tasks]
        known = None not in gains
        rows.append(
            {
                "trial": place,
                "batch": own.get("batch"),
                "known": own.get("known", ""),
                "state": trial.state.name.lower(),
                "value": float(objective.figure(np.array(gains))) if known else None,
                "seen_rows": seen,
                "all_rows": there,
                **{f"gain.{task}": gain for task, gain in zip(objective.tasks, gains, strict=True)},
                "merge_method": point.get("merge_method"),
                "guidance": point.get("guidance"),
                **point.get("numbers", {}),
                **{f"option.{name}": value for name, value in point.get("options", {}).items()},
                **{f"weight.{name}": value for name, value in point.get("weights", {}).items()},
                **{f"depth.{group + 1}": value for group, value in enumerate(point.get("depth", ()))},
                "seconds": trial.duration.total_seconds() if trial.duration else None,
                "failure": own.get("failure", ""),
            }
        )
    return pd.DataFrame(rows)
