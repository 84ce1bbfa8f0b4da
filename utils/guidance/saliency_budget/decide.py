"""Saliency budget, decide half: densities that spend the budget on the largest saliencies, and vectors for the merge."""

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.saliency_budget.shares import shares_of_budget
from utils.guidance.saliency_budget.tables import (
    ExpertSaliency,
    read_power,
    read_saliency,
    read_vector_file,
    read_vectors_of,
)
from utils.plots import color_range, heatmap
from utils.recipes.coefficients import coefficient_table
from utils.recipes.method_rules import GUIDED_MEAN, GUIDED_TIES
from utils.recipes.naming import Naming, Recorded, name_recorded
from utils.recipes.saliency_vectors import vector_file_bytes

_USUAL_BUDGET = 0.4  # in the middle of what LEWIS's densities of 0.3 to 0.8 come to on average, 0.34 to 0.47


def decide(job: DecideJob) -> Decision:
    """Densities that spend the budget on the largest saliencies, and the vectors that the merge method reads."""
    method = job.merge_method
    experts = [entry.type for entry in job.experts]
    measured = read_saliency(job.folder, experts, job.config)
    power = read_power(job.manifest)
    tensors = measured[experts[0]].tensors
    recorded = {row.tensor: Recorded(row.params, has_density=True) for row in tensors.itertuples()}
    naming = name_recorded(recorded, job.models.written, grouped=False)
    usual = 1.0 if method.name == GUIDED_MEAN.name else _USUAL_BUDGET
    budget = usual if job.mean_density is None else job.mean_density
    vectors = {}
    if method.name == GUIDED_TIES.name:
        raised = {name: read_vectors_of(job.folder, name, naming.names, power) for name in experts}
        vectors = {name: vector_file_bytes(axes, power) for name, axes in raised.items()}
    elif method.name == GUIDED_MEAN.name:
        vectors = {name: read_vector_file(job.folder, name, list(naming.names)) for name in experts}
    table = pd.concat([_densities(name, measured[name], naming, budget) for name in experts], ignore_index=True)
    return Decision(
        table=table,
        naming=naming,
        writes_weights=False,
        how=tuple(_how(job, budget, power)),
        after=tuple(_after(table, experts) if method.keeps else ()),
        tags=("saliency_mask",) if method.name == GUIDED_TIES.name else (),
        vectors=vectors,
        pictures=dict if method.keeps else partial(_saliency_pictures, measured, naming),
    )


def _densities(model: str, measured: ExpertSaliency, naming: Naming, budget: float) -> pd.DataFrame:
    tensors = measured.tensors.assign(density=shares_of_budget(measured.counts, measured.zeros, budget))
    wide = tensors.pivot(index="layer", columns="component", values="density")
    wide = wide[list(dict.fromkeys(tensors["component"]))]
    names = {(row.layer, row.component): naming.names[row.tensor] for row in tensors.itertuples()}
    return coefficient_table(model, wide, names, naming.params)


def _saliency_pictures(measured: Mapping[str, ExpertSaliency], naming: Naming) -> dict[str, bytes]:
    """Where whole deltas are kept: a heatmap per expert of where the changes lie that matter most."""
    pictures = {}
    for name, one in measured.items():
        table = _densities(name, one, naming, _USUAL_BUDGET)
        wide = table.pivot(index="layer", columns="component", values="density")[
            list(dict.fromkeys(table["component"]))
        ]
        title = (
            f"{name}: where its change matters most; whole deltas are merged\nshare of a tensor's entries among the "
            f"{_USUAL_BUDGET:.0%} of all with the largest saliency"
        )
        pictures[f"{name}_saliency.png"] = heatmap(wide, title, *color_range(0.0, float(wide.max(axis=None))), "share")
    return pictures


def _how(job: DecideJob, budget: float, power: float) -> list[tuple[str, str]]:
    method = job.merge_method
    usual = "; --mean_density sets another" if job.mean_density is None else ""
    saliency = "delta^2 F" if power == 1 else f"delta^2 F^{power:g}"
    density = (
        "density",
        f"share of a tensor's entries whose saliency, {saliency}, is above one threshold for all of an expert; mean "
        f"{budget}{usual}",
    )
    needs = (
        "this recipe needs this project's utils/merger.py and the files of vectors beside it (stock mergekit-yaml does "
        f"not know {method.name})"
    )
    if method.name == GUIDED_MEAN.name:
        whole = ("density", "1, whole deltas; --mean_density shares out less by saliency")
        return [
            whole if job.mean_density is None else density,
            ("entries", f"each expert counts by F^power of its own text, F by one vector per axis; {needs}"),
            ("weight", "1 for each expert; only ratios of weights matter"),
        ]
    if method.name == GUIDED_TIES.name:
        entries = f"those of largest saliency, by one vector per axis; {needs}"
    else:
        entries = f"as {method.name} chooses them; --mask saliency keeps the most salient instead"
    return [density, ("entries", entries), ("weight", "1")]


def _after(table: pd.DataFrame, experts: Sequence[str]) -> list[str]:
    found = []
    for name in experts:
        density = table.loc[table["model"] == name, "density"]
        none, whole = int((density == 0).sum()), int((density == 1).sum())
        if none or whole:
            found.append(f"{name}: {none} of {len(density)} tensors keep nothing, {whole} keep everything")
    return found
