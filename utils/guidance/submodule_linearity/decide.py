"""Submodule linearity, decide half: the closed form of every part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from utils.errors import UserError
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.submodule_linearity.intervals import half_widths
from utils.guidance.submodule_linearity.method import ATTENTION_MLP, AUTO, FOLD_GRAMS, RIDGE, TENSORS
from utils.guidance.submodule_linearity.report import (
    PartWeights,
    fit_lines,
    interval_lines,
    interval_pictures,
    level_line,
    score_lines,
    score_pictures,
    spread_lines,
)
from utils.guidance.submodule_linearity.tables import (
    Place,
    read_best_levels,
    read_folds,
    read_grams,
    read_scores,
    read_tensors,
)
from utils.guidance.submodule_linearity.weights import best_uniform_weight, merging_weights, misfit
from utils.recipes.coefficients import COLUMNS
from utils.recipes.naming import Naming, Recorded, name_recorded


@dataclass
class _Group:
    """Tensors that share a weight: those of one part, or of several parts that share a tensor (a tied head)."""

    places: list[Place]
    tensors: list[str]


def decide(job: DecideJob) -> Decision:
    """Solve each part's closed form."""
    options, types = job.options, [entry.type for entry in job.experts]
    known = [entry.type for entry in job.config.experts]
    missed = read_best_levels(job.folder, types, known) if options["level"] == AUTO else None
    tensors = read_tensors(job.folder, options["level"] if missed is None else list(missed.idxmin(axis=1)))
    grams = read_grams(job.folder, tensors, types, known)
    scores = read_scores(job.folder, known)
    scores = scores[scores["model"].isin(types)]
    groups = _groups(tensors)
    fits = [misfit([grams[place] for place in group.places], options["task_weighting"]) for group in groups]
    weights = [merging_weights(fit, options["ridge"], options["clip"]) for fit in fits]
    naming = _naming(job, tensors, groups)
    known_by = _Remarks(job, tensors, grams, groups, weights, best_uniform_weight(fits))
    by_tensor = {tensor: own for group, own in zip(groups, weights, strict=True) for tensor in group.tensors}
    return Decision(
        table=_table(job, tensors, by_tensor, naming),
        naming=naming,
        writes_weights=True,
        how=tuple(_how(job)),
        after=("", *spread_lines(types, weights), *fit_lines(fits, weights), *level_line(missed)),
        remarks=lambda: [*known_by.lines, *score_lines(scores, types)],
        tags=tuple(_tags(options)),
        lambda_=1.0,
        pictures=lambda: known_by.pictures() | score_pictures(scores, types),
    )


@dataclass
class _Remarks:
    """What is worked out about the weights only where somebody looks: how sure they are."""

    job: DecideJob
    tensors: pd.DataFrame
    grams: Mapping[Place, np.ndarray]
    groups: Sequence["_Group"]
    weights: Sequence[np.ndarray]
    uniform: float

    @cached_property
    def table(self) -> list[PartWeights] | None:
        """The weights with half the widths of their intervals; None where folds were not measured."""
        types, options = [entry.type for entry in self.job.experts], self.job.options
        known = [entry.type for entry in self.job.config.experts]
        folds = read_folds(self.job.folder, self.tensors, types, known, self.grams)
        if folds is None:
            return None
        sources = [self.job.config.text_of(name) for name in types]
        texts = [sources.index(source) for source in sources]
        chosen = (options["task_weighting"], options["ridge"], options["clip"])
        return [
            PartWeights(
                *group.places[0],
                own,
                half_widths([folds.sums[place] for place in group.places], folds.tokens, texts, *chosen),
            )
            for group, own in zip(self.groups, self.weights, strict=True)
        ]

    @property
    def lines(self) -> list[str]:
        """The intervals in words."""
        types = [entry.type for entry in self.job.experts]
        if self.table is None:
            return [
                f"intervals: none, for {FOLD_GRAMS} is not there (an earlier version measured; measure again for them)"
            ]
        return interval_lines(self.table, types, self.uniform)

    def pictures(self) -> dict[str, bytes]:
        """The weights over the depth, with their intervals."""
        types = [entry.type for entry in self.job.experts]
        blocks = int(self.tensors.loc[self.tensors["component"] != "", "layer"].max()) + 1
        return {} if self.table is None else interval_pictures(self.table, types, self.uniform, blocks)


def _groups(tensors: pd.DataFrame) -> list[_Group]:
    """The parts, those that share a tensor together."""
    found: list[_Group] = []
    of: dict[str, _Group] = {}
    for place, rows in tensors.groupby(["layer", "submodule"], sort=False):
        group = _Group([place], list(rows["tensor"]))
        for other in {id(of[tensor]): of[tensor] for tensor in group.tensors if tensor in of}.values():
            group = _Group([*other.places, *group.places], list(dict.fromkeys([*other.tensors, *group.tensors])))
            found.remove(other)
        found.append(group)
        of |= dict.fromkeys(group.tensors, group)
    return found


def _naming(job: DecideJob, tensors: pd.DataFrame, groups: Sequence[_Group]) -> Naming:
    number_of = {tensor: number for number, group in enumerate(groups) for tensor in group.tensors}
    recorded = {
        row.tensor: Recorded(row.params, bool(row.component), number_of[row.tensor])
        for row in tensors.drop_duplicates("tensor").itertuples()
    }
    naming = name_recorded(recorded, job.models.written, grouped=True)
    if naming.coverage is not None and naming.coverage.uncovered:
        left = [tensor.name for kind in naming.coverage.uncovered.values() for tensor in kind]
        raise UserError(
            f"{job.folder / TENSORS} lacks {', '.join(left[:4])} of the base model, which would get no weight; measure "
            "again with --overwrite",
            "table-row-missing",
        )
    return naming


def _table(job: DecideJob, tensors: pd.DataFrame, weights: Mapping[str, np.ndarray], naming: Naming) -> pd.DataFrame:
    """One row per expert and tensor: components in the order of the blocks, then everything else."""
    own = tensors.drop_duplicates("tensor")
    order = {name: place for place, name in enumerate(dict.fromkeys([*filter(None, own["component"]), ""]))}
    own = own.assign(order=own["component"].map(order)).sort_values(["order", "layer"], kind="stable")
    density = 1.0 if job.mean_density is None else job.mean_density
    rows = [
        (
            entry.type,
            naming.names[row.tensor],
            row.layer,
            row.component,
            density if row.component else 1.0,
            float(weights[row.tensor][place]),
            row.params,
        )
        for place, entry in enumerate(job.experts)
        for row in own.itertuples()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _how(job: DecideJob) -> list[tuple[str, str]]:
    options = job.options
    counted = "each task counting alike" if options["task_weighting"] == "equal" else "tasks counting by their scale"
    clip = "" if options["clip"] is None else f", clipped to [0, {options['clip']:g}]"
    lines = [
        (
            "weight",
            f"closed form per {_PARTS[options['level']]}, {counted}, ridge {options['ridge']:g} towards equal "
            f"shares{clip}; what lies outside the blocks each by its own",
        ),
        ("", "an expert that changes nothing about a part on this text gets 0 there"),
    ]
    if job.mean_density is not None:
        lines.append(("density", f"{job.mean_density} for linear parts of blocks; weights are those for whole deltas"))
    return lines


_PARTS = {
    "block": "block",
    "attention_mlp": "attention, MLP and norm",
    "tensor": "linear map and norm",
    "auto": "part of the level that each block is best weighed at",
}


def _tags(options: Mapping[str, Any]) -> list[str]:
    tags = [] if options["level"] == ATTENTION_MLP else [options["level"]]
    tags += [] if options["task_weighting"] == "equal" else [options["task_weighting"]]
    tags += [] if options["ridge"] == RIDGE else [f"ridge{options['ridge']:g}"]
    return tags if options["clip"] is None else [*tags, f"clip{options['clip']:g}"]
