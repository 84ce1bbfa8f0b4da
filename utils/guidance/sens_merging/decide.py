"""Sens-Merging, decide half: a weight per expert and block from sensitivities and distances."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.sens_merging.method import LAYERS, METHOD, SCALING_ALONE, SENSITIVITY_ALONE
from utils.guidance.sens_merging.tables import Sensitivity, read_outside, read_sensitivity
from utils.guidance.sens_merging.weights import layer_weights, weighing
from utils.recipes.coefficients import COLUMNS
from utils.recipes.naming import Recorded, name_recorded

_LAMBDA = 0.4  # the same group's setting for 1.5B models; 0.7 for 7B, 0.8 for 14B


def decide(job: DecideJob) -> Decision:
    """Weights per layer from sensitivities and distances."""
    measured = read_sensitivity(job.folder, [entry.type for entry in job.experts], job.config)
    layers, sensitivities = _layers(job, measured)
    options = job.options
    alphas, factors = weighing(sensitivities, measured.distances, options["alignment"], options["factors"])
    weights = layer_weights(alphas, factors, options["temperature"])
    recorded = {
        row.tensor: Recorded(int(row.params), bool(row.component), layers.get(row.tensor))
        for row in measured.tensors.itertuples()
    }
    naming = name_recorded(recorded, job.models.written, grouped=True)
    return Decision(
        table=_table(job, measured, layers, weights, naming.names),
        naming=naming,
        writes_weights=True,
        how=tuple(_how(job, factors)),
        after=(_spread(weights),),
        tags=tuple(_tags(job)),
        lambda_=_LAMBDA,
    )


def _layers(job: DecideJob, measured: Sensitivity) -> tuple[dict[str, int], np.ndarray]:
    """The layer that each tensor belongs to (not those of uniform weight), and sensitivities [experts, layers].

    The tensors of a block are a layer; outside the blocks each tensor is one of its own, if it is weighed at all.
    """
    inside = measured.tensors["layer"].between(0, measured.blocks - 1)
    within = measured.tensors[inside]
    layers = dict(zip(within["tensor"], within["layer"].tolist(), strict=True))
    if job.options["outside"] != LAYERS:
        return layers, measured.sensitivities
    experts = [entry.type for entry in job.experts]
    outside = read_outside(job.folder, experts, job.config, measured.tensors[~inside])
    own = {name: measured.blocks + place for place, name in enumerate(dict.fromkeys(outside["layer"]))}
    layers |= {tensor: own[name] for tensor, name in zip(outside["tensor"], outside["layer"], strict=True)}
    once = outside.drop_duplicates("layer")[experts].to_numpy().T
    return layers, np.concatenate([measured.sensitivities, once], axis=1)


def _table(
    job: DecideJob,
    measured: Sensitivity,
    layers: Mapping[str, int],
    weights: np.ndarray,
    names: Mapping[str, str],
) -> pd.DataFrame:
    kept = 1.0 if job.mean_density is None else job.mean_density
    parts = []
    for entry, own in zip(job.experts, weights, strict=True):
        part = measured.tensors.assign(model=entry.type, tensor=[names[name] for name in measured.tensors["tensor"]])
        part["weight"] = [
            float(own[layers[tensor]]) if tensor in layers else 1.0 for tensor in measured.tensors["tensor"]
        ]
        part["density"] = [kept if component else 1.0 for component in part["component"]]
        parts.append(part[list(COLUMNS)])
    return pd.concat(parts, ignore_index=True)


def _how(job: DecideJob, factors: Sequence[float]) -> list[tuple[str, str]]:
    outside = (
        "what lies outside the blocks as layers of its own"
        if job.options["outside"] == LAYERS
        else "what lies outside the blocks gets the uniform weight 1"
    )
    alone = {
        SENSITIVITY_ALONE: "; sensitivity alone: tau is the same for all",
        SCALING_ALONE: "; scaling alone: alpha is the same in all layers",
    }
    listed = ", ".join(f"{entry.type} {factor:.4f}" for entry, factor in zip(job.experts, factors, strict=True))
    favored = {
        "distance": "the expert whose logits differ most from the others' gets the most",
        "similarity": "the expert whose logits agree most with the others' gets the most",
    }
    return [
        (
            "weight",
            f"experts x softmax over experts of tau x alpha / {job.options['temperature']}, per block; {outside}"
            f"{alone.get(job.options['factors'], '')}",
        ),
        ("tau", f"{listed} (alignment {job.options['alignment']}: {favored[job.options['alignment']]})"),
    ]


def _spread(weights: np.ndarray) -> str:
    low, high = float(weights.min()), float(weights.max())
    return f"\nspread: the layers' weights are {low:.4f} to {high:.4f}, {low - 1:+.1%} to {high - 1:+.1%} around uniform (1)"


def _tags(job: DecideJob) -> list[str]:
    given = {
        flag.name: job.options[flag.name] for flag in METHOD.decide_flags if job.options[flag.name] != flag.default
    }
    temperature = given.pop("temperature", None)
    outside = given.pop("outside", None)
    tags = [*([] if temperature is None else [f"temperature{temperature}"]), *given.values()]
    return tags if outside is None else [*tags, f"outside_{outside}"]
