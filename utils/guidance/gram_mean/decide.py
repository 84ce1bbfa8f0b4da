"""gram_mean, decide half: a weight for each expert from what it gains, and the files that the merge method reads."""

from collections.abc import Mapping, Sequence

import pandas as pd

from utils.errors import UserError
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.gram_mean.method import BETWEEN_ROUNDS, FORM, LOW_RANK, METHOD, ROUNDS, SPARSE, gram_file
from utils.guidance.gram_mean.tables import read_grams
from utils.guidance.text_gain import ACCEPT, EQUAL_WEIGHTS, TextGain, refuse_useless_text
from utils.recipes.coefficients import COLUMNS
from utils.recipes.method_rules import GRAM_MEAN
from utils.recipes.naming import Naming, Recorded, name_recorded

_ENOUGH_SAMPLES = 15  # below, the guided mean merges embeddings as well (benchmarks/quality.py)
_DIGITS = 6
_EMBEDDING_ROWS = "embedding_rows"
_KEPT = {
    SPARSE: "{:g} of each linear layer's entries, fitted anew to answer like the whole",
    LOW_RANK: "of each linear layer two factors with {:g} of its numbers, of all such the ones that answer most like the whole",
}
_WHOLE = (
    "{name} is merged alone and all of its change is kept, so that the model will be {name} itself; --mean_density {density} "
    "keeps that share of each linear layer's entries, fitted anew to answer like the whole"
)


def decide(job: DecideJob) -> Decision:
    """Weights by gain; everything else is in the files."""
    if job.merge_method.name != GRAM_MEAN.name:
        raise UserError(
            f"--merge_method {job.merge_method.name} cannot merge by Gram matrices; leave it out, or give {GRAM_MEAN.name}",
            "merge-method-unfit",
        )
    names = [entry.type for entry in job.experts]
    measured = read_grams(job.folder, names, [entry.type for entry in job.config.experts])
    tensors, gains = measured.tensors, measured.gains
    recorded = {
        row.tensor: Recorded(row.params, has_density=bool(job.merge_method.keeps)) for row in tensors.itertuples()
    }
    naming = name_recorded(recorded, job.models.written, grouped=False)
    weights, warnings = _weights(job, gains)
    density = job.mean_density if job.merge_method.keeps else None
    form = _form(job, density)
    samples = min(one.samples for one in gains.values())
    alone = len(names) == 1
    if alone and (density is None or density >= 1):
        warnings.append(_WHOLE.format(name=names[0], density=METHOD.density_alone))
    else:
        warnings += _of_another_merge(job, names)
    return Decision(
        table=_table(tensors, naming, weights, density),
        naming=naming,
        writes_weights=False,
        how=tuple(_how_one(density, form) if alone else _how(job, gains, samples, density, form)),
        after=() if alone else tuple(_after(tensors)),
        warnings=tuple(warnings),
        tags=(form,) if form == LOW_RANK else (),
        fits_adapter=alone and form == LOW_RANK and not job.models.routers,
        parameters={_EMBEDDING_ROWS: samples >= _ENOUGH_SAMPLES} | _cutting(form, density),
        measured={name: gram_file(name) for name in names},
        expert_weights=weights,
    )


def _form(job: DecideJob, density: float | None) -> str:
    """What a density leaves of a change. Raises a `UserError` if nothing is left out, so that factors have no size."""
    if job.options[FORM] == LOW_RANK and (density is None or density >= 1):
        raise UserError(
            f"--{FORM} {LOW_RANK} takes its ranks from --mean_density, the share of a layer's numbers that two factors hold; "
            "give --mean_density 0.1",
            "flag-no-effect",
        )
    return job.options[FORM]


def _cutting(form: str, density: float | None) -> dict[str, bool]:
    """How a density cuts, for the merge method."""
    if density is None or density >= 1:
        return {}
    return {"low_rank": True} if form == LOW_RANK else {"joint_support": True}


def _weights(job: DecideJob, gains: Mapping[str, TextGain]) -> tuple[dict[str, float], list[str]]:
    """Shares of 1 by 1 / gain; equal ones where a gain that is not sure was accepted while measuring."""
    doubtful = [name for name, one in gains.items() if not one.is_sure]
    if _measured_with(job, ACCEPT) is not True:
        refuse_useless_text(gains, f"{ACCEPT} (of lewis_importance.py)", EQUAL_WEIGHTS)
    pulls = {name: 1.0 if doubtful else 1 / one.gain for name, one in gains.items()}
    total = sum(pulls.values())
    weights = {name: float(f"{pull / total:.{_DIGITS}g}") for name, pull in pulls.items()}
    found = f"{', '.join(doubtful)}: no sure gain over the base on its own text, so all experts have equal weights"
    return weights, [found] if doubtful else []


def _measured_with(job: DecideJob, flag: str) -> object:
    """The value of a flag of command 1; None where the folder does not say."""
    options = (job.manifest or {}).get("guidance_options")
    return options.get(flag) if isinstance(options, dict) else None


def _table(tensors: pd.DataFrame, naming: Naming, weights: Mapping[str, float], density: float | None) -> pd.DataFrame:
    names = [naming.names[tensor] for tensor in tensors["tensor"]]
    table = tensors.assign(
        tensor=names, density=1.0 if density is None else density, weight=[weights[name] for name in tensors["model"]]
    )
    return table[list(COLUMNS)].reset_index(drop=True)


def _how(
    job: DecideJob, gains: Mapping[str, TextGain], samples: int, density: float | None, form: str
) -> list[tuple[str, str]]:
    weighed = (
        "in proportion to 1 / gain" if all(one.is_sure for one in gains.values()) else "equal, whatever was gained"
    )
    shown = ", ".join(f"{name} {one.gain:.3f}" for name, one in gains.items())
    asked = job.config.global_parameters.get(_EMBEDDING_ROWS)
    rows = samples >= _ENOUGH_SAMPLES if asked is None else asked
    few = f"{samples} samples are few" if asked is None else f"{_EMBEDDING_ROWS} of the pair config is false"
    embeddings = "row by row, in the metric of their gradients" if rows else f"by the guided mean: {few}"
    return [
        ("density", _kept(density, form)),
        ("weight", f"{weighed} on each one's own text (nats per token: {shown})"),
        ("linear layers", "the change that answers as each expert does on the inputs of its own text"),
        *_inputs(_measured_with(job, ROUNDS)),
        ("embeddings", embeddings),
        ("norms and biases", "by the guided mean"),
        (
            "files",
            "this recipe needs this project's utils/merger.py and the files in the dataframe folder (stock "
            f"mergekit-yaml does not know {GRAM_MEAN.name})",
        ),
    ]


def _of_another_merge(job: DecideJob, names: Sequence[str]) -> list[str]:
    """A sentence if the inputs are those of a merge of other experts than these."""
    between = (job.manifest or {}).get(BETWEEN_ROUNDS)
    merged = between.get("experts") if isinstance(between, dict) else None
    if not isinstance(merged, list) or sorted(map(str, merged)) == sorted(names):
        return []
    return [
        f"the inputs of linear layers are those of a merge of {', '.join(map(str, merged))}, and this recipe merges "
        f"{', '.join(names)}; measure again with this config, into another folder"
    ]


def _inputs(rounds: object) -> list[tuple[str, str]]:
    """Whose inputs were measured; nothing where the folder does not say."""
    if rounds == 1:
        return [("inputs", f"those of base and expert; lewis_importance.py --{ROUNDS} 2 takes those of their merge")]
    return [("inputs", f"those of the model that was merged in round {rounds - 1}")] if isinstance(rounds, int) else []


def _how_one(density: float | None, form: str) -> list[tuple[str, str]]:
    return [
        ("density", _kept(density, form) + ("; --mean_density sets another" if density is not None else "")),
        ("the rest", "embeddings, norms and biases are the expert's: there is nobody to weigh it against"),
        ("files", "this recipe needs this project's utils/merger.py and the file in the dataframe folder"),
    ]


def _kept(density: float | None, form: str) -> str:
    if density is None:
        return "1, whole changes; --mean_density keeps less of the linear layers, fitted anew to answer like the whole"
    return _KEPT[form].format(density)


def _after(tensors: pd.DataFrame) -> list[str]:
    short = tensors[tensors["tokens"] < tensors["channels"]]
    if short.empty:
        return []
    counts = ", ".join(f"{name} {len(part)}" for name, part in short.groupby("model", sort=False))
    return [f"layers with fewer tokens than input channels, where the guided mean fills up: {counts}"]
