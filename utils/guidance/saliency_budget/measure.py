"""Saliency budget, measure half: saliencies of every expert on its own text, and vectors for every parameter."""

from collections.abc import Sequence

import pandas as pd

from utils.guidance.csv_files import csv_bytes
from utils.guidance.few_tokens import EXPERT_TOKENS, fewest_tokens
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.own_text import accepted_doubts, gains_on_own_text
from utils.guidance.saliency_budget.expert_saliency import ExpertMeasurement, ask, measure_saliency
from utils.guidance.saliency_budget.method import HISTOGRAM, POINTS, TENSORS, vector_file
from utils.guidance.saliency_budget.tables import TENSOR_TABLE, histogram_content
from utils.passes.experts_in_parts import stack_names
from utils.passes.gradient_memory import beside_two, gradient_memory
from utils.passes.language_head import require_head
from utils.passes.subjects import Subject, largest_block, require_own_tensors, snapshot_bytes
from utils.recipes.saliency_vectors import vector_file_bytes
from utils.workers.piece import Piece

_SILENT = 0.1  # share of the changed entries without any gradient from which on something is wrong


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    parts = job.base.decoder.components
    point = {"base": "at the base", "expert": "at each expert", "both": "at the base and at each expert, added up"}
    lines = [
        f"components: {', '.join(part.name for part in parts)} "
        f"({'as configured' if job.config.components else 'every linear part of a block'}); vectors of every parameter",
        f"gradients: {point[job.options['gradient_at']]}, sample by sample, block by block",
    ]
    if any(part.is_stacked for part in parts) and (fewest := fewest_tokens(job.options)):
        lines.append(
            f"experts: by the tokens routed to each; below {fewest} (--{EXPERT_TOKENS}) taken towards the mean of its layer"
        )
    return lines


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak of an expert's pass, about: both models, and one block's squared gradients (experts that come one
    at a time aside)."""
    found = []
    for expert in job.experts:
        needed = [gradient_memory(subject, job.text(subject, expert).encoded) for subject in _at(job, expert)]
        block = max(largest_block(subject) for subject in (job.base, expert))
        fetched = 2 * block * expert.dtype.itemsize * (2 - len(needed))
        first, *others = sorted(needed, key=lambda one: -one.peak())
        extra = beside_two(job.devices[0]) if len(needed) > 1 else 0
        found.append(first.peak(4 * block) + sum(one.held for one in others) + fetched + extra)
    return max(found)


def waiting(job: MeasureJob) -> int:
    """Bytes that wait for the way back of the passes that are made at a time, at most; squares of experts that come one at a
    time among them."""
    return job.experts_at_a_time * max(_waiting(job, expert) for expert in job.experts)


def _waiting(job: MeasureJob, expert: Subject) -> int:
    states = sum(gradient_memory(subject, job.text(subject, expert).encoded).waiting for subject in _at(job, expert))
    apart = [_experts(subject) for subject in (job.base, expert) if subject.experts_apart]
    return states + 4 * max(apart, default=0)


def _experts(subject: Subject) -> int:
    """Entries of a block's experts, at most."""
    blocks = range(len(subject.decoder.blocks))
    stacks = (stack_names(subject.decoder, layer, subject.layout) for layer in blocks)
    return max(sum(subject.decoder.model.get_parameter(name).numel() for name in names) for names in stacks)


def on_disk(job: MeasureJob) -> int:
    """Bytes of the files in which hidden states and squares of experts wait, and of the snapshots beside, of base and expert."""
    snapshot = max(snapshot_bytes(subject) for subject in job.subjects)
    return waiting(job) + job.experts_at_a_time * 2 * snapshot


def _at(job: MeasureJob, expert: Subject) -> tuple[Subject, ...]:
    """The models whose gradients are taken."""
    wanted = POINTS[job.options["gradient_at"]]
    return tuple(subject for subject, is_wanted in zip((job.base, expert), wanted, strict=True) if is_wanted)


def measure(job: MeasureJob) -> Measured:
    """Saliencies of every expert on its own text."""
    require_own_tensors(job.base)
    pieces, left = [], sum(_waiting(job, expert) for expert in job.experts)
    for expert in job.experts:
        for subject in _at(job, expert):
            require_head(subject.decoder, subject.layout, f"model {subject.entry.name}")
        name, blocks = expert.entry.type, 2 * len(_at(job, expert)) * len(expert.decoder.blocks)
        pieces.append(Piece(name, measure_saliency, (job.of(job.base, expert),), blocks, name, (ExpertMeasurement,)))
    on_text = gains_on_own_text(job, job.experts, ask, left=left, least=on_disk(job))
    measured = dict(zip((expert.entry.type for expert in job.experts), job.run(pieces), strict=True))
    tensors = TENSOR_TABLE.frame(row for one in measured.values() for row in one.tensors)
    bins = histogram_content({name: one.bins for name, one in measured.items()})
    files = {TENSORS: csv_bytes(tensors), HISTOGRAM: bins}
    files |= {vector_file(name): vector_file_bytes(one.vectors) for name, one in measured.items()}
    notes, warnings = [], []
    for expert in job.experts:
        name = expert.entry.type
        own = tensors[tensors["model"] == name]
        notes.append(_note(name, own, measured[name].losses))
        warnings += _doubts(expert, own)
    warnings += [*on_text.not_asked, *accepted_doubts(on_text.gains)]
    routing = (*on_text.routing, *(row for one in measured.values() for row in one.routing))
    tokens = tuple(row for one in measured.values() for row in one.expert_tokens)
    return Measured(files, tuple(notes), tuple(warnings), routing, tokens)


def _note(model: str, tensors: pd.DataFrame, losses: Sequence[tuple[float, ...]]) -> str:
    shown = [
        f"{sum(values) / len(values):.4f} at {point}"
        for point, values in zip(("the base", "the expert"), losses, strict=True)
        if values
    ]
    explained = tensors["explained"]
    return (
        f"{model}: loss {', '.join(shown)} (nats per token on its own text, {len(max(losses, key=len))} samples); two "
        f"vectors per tensor explain {explained.median():.0%} of the variance of log F (median over tensors; least "
        f"{explained.min():.0%})"
    )


def _doubts(expert: Subject, tensors: pd.DataFrame) -> list[str]:
    changed = int(tensors["changed"].sum())
    if not changed:
        return [f"{expert.entry.name} has exactly the base's weights in all that was measured; is it the same model?"]
    silent = (tensors["changed"] - (tensors["params"] - tensors["zeros"])).sum() / changed
    if silent < _SILENT:
        return []
    return [
        f"{silent:.0%} of the entries that {expert.entry.name} changed have no gradient on this text in {expert.dtype}; "
        "more samples or --dtype float32 or bfloat16 may help"
    ]
