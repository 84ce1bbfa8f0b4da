"""Sens-Merging, decide half: a weight per expert and block from sensitivities and distances."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.sens_merging.method import METHOD
from utils.guidance.sens_merging.tables import Sensitivity, read_sensitivity
from utils.guidance.sens_merging.weights import alignment_factors, layer_weights, normalized_sensitivities
from utils.recipes.coefficients import COLUMNS
from utils.recipes.naming import Recorded, name_recorded

_LAMBDA = 0.4  # the same group's setting for 1.5B models; 0.7 for 7B, 0.8 for 14B


def decide(job: DecideJob) -> Decision:
    """Weights per layer from sensitivities and distances."""
    measured = read_sensitivity(job.folder, [entry.type for entry in job.experts], job.config)
    temperature, alignment = job.options["temperature"], job.options["alignment"]
    factors = alignment_factors(measured.distances, alignment)
    weights = layer_weights(normalized_sensitivities(measured.sensitivities), factors, temperature)
    recorded = {
        row.tensor: Recorded(int(row.params), bool(row.component), _group(row.layer, measured))
        for row in measured.tensors.itertuples()
    }
    naming = name_recorded(recorded, job.models.written, grouped=True)
    return Decision(
        table=_table(job, measured, weights, naming.names),
        naming=naming,
        writes_weights=True,
        how=tuple(_how(job, factors)),
        after=(_spread(weights),),
        tags=tuple(_tags(job)),
        lambda_=_LAMBDA,
    )


def _group(layer: int, measured: Sensitivity) -> int | None:
    """What shares one weight: the tensors of a block, and all that lie outside."""
    return layer if 0 <= layer < measured.blocks else None


def _table(job: DecideJob, measured: Sensitivity, weights: np.ndarray, names: Mapping[str, str]) -> pd.DataFrame:
    kept = 1.0 if job.mean_density is None else job.mean_density
    parts = []
    for entry, own in zip(job.experts, weights, strict=True):
        part = measured.tensors.assign(model=entry.type, tensor=[names[name] for name in measured.tensors["tensor"]])
        part["weight"] = [
            1.0 if _group(layer, measured) is None else float(own[layer]) for layer in part["layer"].tolist()
        ]
        part["density"] = [kept if component else 1.0 for component in part["component"]]
        parts.append(part[list(COLUMNS)])
    return pd.concat(parts, ignore_index=True)


def _how(job: DecideJob, factors: Sequence[float]) -> list[tuple[str, str]]:
    listed = ", ".join(f"{entry.type} {factor:.4f}" for entry, factor in zip(job.experts, factors, strict=True))
    favored = {
        "distance": "the expert whose logits differ most from the others' gets the most",
        "similarity": "the expert whose logits agree most with the others' gets the most",
    }
    return [
        (
            "weight",
            f"experts x softmax over experts of tau x alpha / {job.options['temperature']}, per block; what lies outside "
            "the blocks gets the uniform weight 1",
        ),
        ("tau", f"{listed} (alignment {job.options['alignment']}: {favored[job.options['alignment']]})"),
    ]


def _spread(weights: np.ndarray) -> str:
    low, high = float(weights.min()), float(weights.max())
    return f"\nspread: the blocks' weights are {low:.4f} to {high:.4f}, {low - 1:+.1%} to {high - 1:+.1%} around uniform (1)"


def _tags(job: DecideJob) -> list[str]:
    given = {
        flag.name: job.options[flag.name] for flag in METHOD.decide_flags if job.options[flag.name] != flag.default
    }
    temperature = given.pop("temperature", None)
    return [*([] if temperature is None else [f"temperature{temperature}"]), *given.values()]
