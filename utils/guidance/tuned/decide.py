"""tuned, decide half: the recipe that was started from, with the coefficients in it."""

import pandas as pd

from utils.errors import UserError
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.tuned.method import LEVEL, LEVELS
from utils.guidance.tuned.start import Start, refuse_changed_parts
from utils.guidance.tuned.tables import read_tuned
from utils.recipes.coefficients import COLUMNS
from utils.recipes.naming import Recorded, name_recorded


def decide(job: DecideJob) -> Decision:
    """Coefficients as weights of plain changes, or as factors in a method of this project's."""
    names = [entry.type for entry in job.experts]
    table, start = read_tuned(job.folder, names, [entry.type for entry in job.config.experts])
    if job.merge_method.name != start.merge_method:
        raise UserError(
            f"--merge_method {job.merge_method.name}: the coefficients in {job.folder} were tuned for "
            f"{start.merge_method}; leave it out",
            "merge-method-unfit",
        )
    refuse_changed_parts(start, job.folder)
    own = table[table["model"] == names[0]]
    recorded = {
        row.tensor: Recorded(int(row.params), has_density=bool(row.component), group=row.tensor)
        for row in own.itertuples()
    }
    naming = name_recorded(recorded, job.models.written, grouped=True)
    return Decision(
        table=_table(job, table, start, naming.names),
        naming=naming,
        writes_weights=start.is_plain,
        writes_factors=not start.is_plain,
        how=(
            ("start", f"{start.merge_method}, weights {_listed(start.weights)}"),
            ("coefficients", f"by gradient on calibration text, one for each expert{_level(job)}; see tuned_steps.csv"),
        ),
        after=(_spread(table),),
        expert_weights=start.weights,
        measured=start.saliency,
        fixed=start.parameters,
        router=start.router,
    )


def _level(job: DecideJob) -> str:
    """What else has one of its own, as far as the folder says it."""
    options = (job.manifest or {}).get("guidance_options")
    level = options.get(LEVEL) if isinstance(options, dict) else None
    return "" if level in (None, LEVELS[-1]) else f" and {level}"


def _table(job: DecideJob, table: pd.DataFrame, start: Start, names: dict) -> pd.DataFrame:
    scale = table["model"].map(start.weights) if start.is_plain else 1.0
    kept = 1.0 if job.mean_density is None else job.mean_density
    found = table.assign(
        tensor=[names[tensor] for tensor in table["tensor"]],
        weight=scale * table["coefficient"],
        density=[kept if component else 1.0 for component in table["component"]],
    )
    return found[list(COLUMNS)].reset_index(drop=True)


def _listed(weights) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())


def _spread(table: pd.DataFrame) -> str:
    parts = [
        f"{name} {own['coefficient'].min():.3f} to {own['coefficient'].max():.3f}, mean "
        f"{(own['coefficient'] * own['params']).sum() / own['params'].sum():.3f}"
        for name, own in table.groupby("model", sort=False)
    ]
    return "\ncoefficients (1: as in the start): " + "; ".join(parts)
