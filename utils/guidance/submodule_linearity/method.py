"""Submodule linearity (arXiv 2504.10902): merging weights in closed form for each part of the network.

A part (a block; attention, MLP and norms; or each tensor) is nearly linear in its parameters where a whole model is not,
so that what a merge changes about its output is nearly the weighted sum of what the experts change:

    Delta_s(x) = f(x; theta_s) - f(x; theta_0)                inputs x: the base's own, on the text of task t
    G^t[m,s]   = mean over tokens x of < Delta_m(x), Delta_s(x) >
    A a = b,   A = sum_t w_t G^t,   b_m = sum_t w_t G^t[m,t]   the weights a of least sum_t w_t E|sum_s a_s Delta_s - Delta_t|^2
    merged     = theta_0 + sum_s a_s delta_s                  part by part

The *measure* half records G for the parts of every level (`utils/guidance/submodule_linearity/comparison.py`) and how non-linear the larger
ones are, the *decide* half solves (`utils/guidance/submodule_linearity/weights.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.flags import number
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.folder import csv_bytes
from utils.guidance.measure_job import MeasureJob, OnBlock, Work
from utils.guidance.method import GuidanceMethod, Measured, MethodFlag
from utils.guidance.submodule_linearity.tables import (
    GRAM,
    LEVELS,
    SCORES,
    TENSORS,
    Place,
    gram_table,
    read_grams,
    read_scores,
    read_tensors,
    scores_table,
    tensors_table,
)
from utils.passes.subjects import Subject
from utils.recipes.coefficients import COLUMNS
from utils.recipes.naming import Naming, Recorded, name_recorded
from utils.runtime import gigabytes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from utils.guidance.submodule_linearity.outside_changes import ComparedModel
    from utils.guidance.submodule_linearity.part_changes import PartChanges

NAME = "submodule_linearity"
WEIGHTINGS = ("equal", "raw")  # of utils/guidance/submodule_linearity/weights.py, which imports numpy
_RIDGE = 0.1  # kept a little more of two small experts than none did (validation text, two seeds); from 0.3 on, less


# --- measure ----------------------------------------------------------------------------------------------------------


def _choices(job: MeasureJob) -> list[str]:
    models = (job.base, *job.experts)
    largest = max(sum(value.numel() for value in block.parameters()) for block in job.base.decoder.blocks)
    lines = [
        "inputs: the base's own; parts: blocks, their children, every module with parameters; all in float32, because "
        "bfloat16 would round away what a fine-tune changes",
        f"memory: two blocks of all {len(models)} models together, {gigabytes(2 * 4 * largest * len(models))}, are part "
        "of what it needs beside the estimate below",
    ]
    if len(job.devices) > 1:
        lines.append(f"of the devices only {job.devices[0]} is used: the models go through one block together")
    return lines


def _measure(job: MeasureJob) -> Measured:
    """Gram matrices, tensors and scores of every part, in one pass of the base through all texts."""
    from utils.guidance.submodule_linearity.comparison import require_comparable

    require_comparable(job.base.decoder, {f"model {one.entry.name}": one.decoder for one in job.experts})
    compared = [_with_head(subject) for subject in (job.base, *job.experts)]
    work = Work(NAME, len(job.base.decoder.blocks), partial(_compared, job, compared))
    (parts,) = job.run([work])
    _refuse_not_finite(job, parts)
    types = [expert.entry.type for expert in job.experts]
    text_of = {one: list(job.config.texts).index(job.config.text_of(one)) for one in types}
    files = {
        GRAM: gram_table(parts, types, text_of),
        TENSORS: tensors_table(compared[0], parts),
        SCORES: scores_table(parts, types),
    }
    return Measured({name: csv_bytes(table) for name, table in files.items()}, warnings=tuple(_warnings(job, parts)))


def _with_head(subject: Subject) -> Subject:
    """The subject with the head's name among its headers."""
    from utils.models.weight_source import match_names

    if subject.headers is None:
        return subject
    headers = match_names(subject.decoder.model, subject.checkpoint, head=True)
    if headers is None:
        raise UserError(
            f"model {subject.entry.name}: its checkpoint holds no language-model head; save the whole causal language "
            "model"
        )
    return replace(subject, headers=headers)


def _compared(
    job: MeasureJob, compared: Sequence[Subject], device: "torch.device", on_block: OnBlock
) -> "list[PartChanges]":
    from utils.guidance.submodule_linearity.comparison import ComparedText, compare_models

    types = [expert.entry.type for expert in job.experts]
    texts = [
        ComparedText(
            job.base.texts[source].batches,
            tuple(place for place, one in enumerate(types) if job.config.text_of(one) == source),
        )
        for source in job.config.texts
    ]
    base, *experts = (_opened(job, subject, device) for subject in compared)
    return compare_models(base, experts, texts, device, scores=bool(job.options["nonlinearity"]), on_block=on_block)


def _opened(job: MeasureJob, subject: Subject, device: "torch.device") -> "ComparedModel":
    import torch

    from utils.guidance.submodule_linearity.outside_changes import ComparedModel

    weights = job.open_weights(replace(subject, dtype=torch.float32), device)
    stored = weights if subject.headers is None else job.open_weights(subject, device)
    return ComparedModel(subject.decoder, weights, stored, f"model {subject.entry.name}")


def _refuse_not_finite(job: MeasureJob, parts: "Sequence[PartChanges]") -> None:
    for part in parts:
        if not bool(part.grams.isfinite().all()):
            raise UserError(
                f"what the experts change about {part.name} of layer {part.layer} is not finite: the weights of a model "
                f"or the hidden states of {job.base.entry.name} are not; check the checkpoints"
            )


def _warnings(job: MeasureJob, parts: "Sequence[PartChanges]") -> list[str]:
    found = []
    for place, expert in enumerate(job.experts):
        if not any(float(part.grams[:, place, place].sum()) > 0 for part in parts):
            found.append(f"{expert.entry.name} changes nothing on this text; is it the base?")
    rows = {one.decoder.model.get_output_embeddings().weight.shape[0] for one in (job.base, *job.experts)}
    if len(rows) > 1:
        found.append(
            f"vocabularies have {min(rows)} to {max(rows)} rows; the head is weighed by the first {min(rows)}, which all have"
        )
    return found


# --- decide -----------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Tensors that share a weight: those of one part, or of several parts that share a tensor (a tied head)."""

    places: list[Place]
    tensors: list[str]


def _decide(job: DecideJob) -> Decision:
    """Solve each part's closed form."""
    from utils.guidance.submodule_linearity.report import fit_lines, score_lines, score_pictures, spread_lines
    from utils.guidance.submodule_linearity.weights import merging_weights, misfit

    options, types = job.options, [entry.type for entry in job.experts]
    known = [entry.type for entry in job.config.experts]
    tensors = read_tensors(job.folder, options["level"])
    grams = read_grams(job.folder, tensors, types, known)
    scores = read_scores(job.folder, known)
    scores = scores[scores["model"].isin(types)]
    groups = _groups(tensors)
    fits = [misfit([grams[place] for place in group.places], options["task_weighting"]) for group in groups]
    weights = [merging_weights(fit, options["ridge"], options["clip"]) for fit in fits]
    naming = _naming(job, tensors, groups)
    by_tensor = {tensor: own for group, own in zip(groups, weights, strict=True) for tensor in group.tensors}
    return Decision(
        table=_table(job, tensors, by_tensor, naming),
        naming=naming,
        writes_weights=True,
        how=tuple(_how(job)),
        after=("", *spread_lines(types, weights), *fit_lines(fits, weights), *score_lines(scores, types)),
        tags=tuple(_tags(options)),
        lambda_=1.0,
        pictures=partial(score_pictures, scores, types),
    )


def _groups(tensors: "pd.DataFrame") -> list[_Group]:
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


def _naming(job: DecideJob, tensors: "pd.DataFrame", groups: Sequence[_Group]) -> Naming:
    number_of = {tensor: number for number, group in enumerate(groups) for tensor in group.tensors}
    recorded = {
        row.tensor: Recorded(row.params, bool(row.component), number_of[row.tensor])
        for row in tensors.drop_duplicates("tensor").itertuples()
    }
    naming = name_recorded(job.config, recorded, job.local, grouped=True, trust_remote_code=job.trust_remote_code)
    if naming.coverage is not None and naming.coverage.uncovered:
        left = [tensor.name for kind in naming.coverage.uncovered.values() for tensor in kind]
        raise UserError(
            f"{job.folder / TENSORS} lacks {', '.join(left[:4])} of the base model, which would get no weight; measure "
            "again with --overwrite"
        )
    return naming


def _table(
    job: DecideJob, tensors: "pd.DataFrame", weights: "Mapping[str, np.ndarray]", naming: Naming
) -> "pd.DataFrame":
    """One row per expert and tensor: components in the order of the blocks, then everything else."""
    import pandas as pd

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


_PARTS = {"block": "block", "attention_mlp": "attention, MLP and norm", "tensor": "linear map and norm"}


def _tags(options: Mapping[str, Any]) -> list[str]:
    tags = [] if options["level"] == "attention_mlp" else [options["level"]]
    tags += [] if options["task_weighting"] == "equal" else [options["task_weighting"]]
    tags += [] if options["ridge"] == _RIDGE else [f"ridge{options['ridge']:g}"]
    return tags if options["clip"] is None else [*tags, f"clip{options['clip']:g}"]


METHOD = GuidanceMethod(
    name=NAME,
    summary="weights per part in closed form, from what each expert changes about its output (arXiv 2504.10902)",
    gives="weights",
    merge_method="task_arithmetic",
    files=lambda config: (GRAM, TENSORS, SCORES),
    choices=_choices,
    measure=_measure,
    decide=_decide,
    measure_flags=(MethodFlag("nonlinearity", "also measure how non-linear each part is", switch=True, default=True),),
    decide_flags=(
        MethodFlag("level", "what gets a weight of its own inside the blocks", choices=LEVELS, default="attention_mlp"),
        MethodFlag(
            "task_weighting",
            "equal: each expert's task counts alike; raw: by how much its expert changes",
            choices=WEIGHTINGS,
            default="equal",
        ),
        MethodFlag(
            "ridge", "pull towards equal shares, relative to the mean square of the changes", number(0), default=_RIDGE
        ),
        MethodFlag("clip", "clip weights to [0, this], at least 0 (not clipped if left out)", number(0)),
    ),
    text_per_task=True,
)
