"""LEWIS, decide half: densities from the delta tables, scaled to a mean if one is asked for."""

import pandas as pd

from utils.errors import UserError
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.lewis.densities import densities, share_at_bounds
from utils.guidance.lewis.method import delta_file
from utils.guidance.lewis.naming import name_tensors
from utils.guidance.lewis.tables import Measurements, read_measurements, read_noise
from utils.recipes.coefficients import coefficient_table, with_mean_density


def decide(job: DecideJob) -> Decision:
    """Densities from the delta tables, scaled to a mean if one is asked for."""
    gamma, epsilon = job.options["gamma"] + 0.0, job.options["epsilon"]  # -0 is 0, in the file name too
    bound = job.options["bound"]
    as_weights = bool(job.options["apply_lewis_to_weights"])
    if gamma > epsilon:
        raise UserError(
            f"--gamma {gamma} is above --epsilon {epsilon}: gamma is the density of what changed "
            "least, epsilon of what changed most; swap them",
            "flag-invalid",
        )
    measured = _read(job)
    naming = name_tensors(job.config, measured, job.models.written)
    columns = list(measured.deltas[job.experts[0].type].columns)
    parts = []
    for entry in job.experts:
        density = densities(measured.deltas[entry.type][columns], gamma, epsilon, bound)
        parts.append(coefficient_table(entry.type, density, naming.names, naming.params, as_weights=as_weights))
    table = pd.concat(parts, ignore_index=True)
    if job.mean_density is not None:
        table = with_mean_density(table, job.mean_density, as_weights=as_weights)
    clip = ("clip",) if bound == "clip" else ()
    return Decision(
        table=table,
        naming=naming,
        writes_weights=as_weights,
        how=tuple(_how(job)),
        after=(*(_at_bounds(table, job) if clip and job.mean_density is None else ()), *_rounded(job)),
        warnings=measured.warnings,
        numbers=(gamma, epsilon),
        tags=clip,
        tags_beside=("weights",) if as_weights else (),
        scale=(gamma, epsilon) if job.mean_density is None else None,
    )


def _read(job: DecideJob) -> Measurements:
    config, folder = job.config, job.folder
    merged = [entry.type for entry in job.experts]
    # A table of an expert that the config measures but does not merge may lie there; it is checked and left out.
    spare = [
        entry.type
        for entry in config.experts
        if entry.type not in merged and (folder / delta_file(entry.type)).exists()
    ]
    measured = read_measurements(
        folder, [*merged, *spare], config.base_model_type, config.components, has_norms=job.manifest is not None
    )
    first = measured.deltas[merged[0]]
    for model_type in merged[1:]:
        if set(measured.deltas[model_type].columns) != set(first.columns):
            raise UserError(
                f"dataframe folder {folder}: {delta_file(merged[0])} and {delta_file(model_type)} hold different "
                "components; measure both experts with the same config",
                "dataframes-other-config",
            )
    return measured


def _rounded(job: DecideJob) -> list[str]:
    """A line per expert whose deltas hold rounding."""
    types = [entry.type for entry in job.experts]
    table = read_noise(job.folder, types, [entry.type for entry in job.config.experts])
    return [
        f"{name}: up to {own['noise'].max():.1%} of a delta is rounding of the forward pass (median "
        f"{own['noise'].median():.1%}); measure with --dtype float32 for none"
        for name, own in table.groupby("model", sort=False)
    ]


def _how(job: DecideJob) -> list[tuple[str, str]]:
    gamma, epsilon = job.options["gamma"], job.options["epsilon"]
    if job.options["bound"] == "clip":
        text = f"clip: delta / largest delta of the expert, clipped to [{gamma}, {epsilon}]"
    else:
        text = f"minmax: {gamma} for the smallest delta of the expert to {epsilon} for the largest"
    lines = [("density", text)]
    if job.mean_density is not None:
        lines.append(
            (
                "",
                f"then min(1, c x density) with a mean of {job.mean_density} per expert; gamma and epsilon shape the "
                "densities but no longer bind them",
            )
        )
    lines.append(("weight", "the same numbers" if job.options["apply_lewis_to_weights"] else "1"))
    return lines


def _at_bounds(table: pd.DataFrame, job: DecideJob) -> list[str]:
    gamma, epsilon = job.options["gamma"], job.options["epsilon"]
    lines = []
    for entry in job.experts:
        low, high = share_at_bounds(table[table["model"] == entry.type][["density"]], gamma, epsilon)
        lines.append(f"{entry.type}: at the bounds {low:.0%} of the tensors at {gamma}, {high:.0%} at {epsilon}")
    return lines
