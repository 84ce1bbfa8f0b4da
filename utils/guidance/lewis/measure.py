"""LEWIS, measure half: norms of the base and the experts, and the delta tables they make."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch

from utils.errors import UserError
from utils.guidance.expert_tokens import token_rows
from utils.guidance.few_tokens import fewest_tokens
from utils.guidance.lewis.deltas import delta_table
from utils.guidance.lewis.noise import (
    SAMPLES,
    is_rounded,
    noise_note,
    noise_warnings,
    relative_noise,
    trial_batch,
)
from utils.guidance.lewis.own_text import asked, gains_before, gains_of_passes, is_scored, not_asked_lines
from utils.guidance.lewis.ranges import norms_of_ranges
from utils.guidance.lewis.tables import NOISE_TABLE, TEXT, TOKENS, table_files
from utils.guidance.lewis.text_pass import measured_norms, range_sums
from utils.guidance.lewis.visitor import StackNorms
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.own_text import accepted_doubts
from utils.models.decoder import Component
from utils.pair.source import CalibrationSource
from utils.passes.dry_walk import dry_walk
from utils.passes.sample_losses import head_bytes
from utils.passes.subjects import (
    EncodedText,
    StoredPart,
    Subject,
    largest_block,
    memory_estimate,
    require_own_tensors,
    snapshot_bytes,
)
from utils.workers.piece import Piece


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    config = job.config
    names = ", ".join(part.name for part in job.base.decoder.components)
    lines = [f"components: {names} ({'as configured' if config.components else 'every linear part of a block'})"]
    if partial := job.base.decoder.partial:
        lines.append(f"in some blocks only: {', '.join(part.name for part in partial)}; normalized over those blocks")
    if config.parity:
        lines.append("parity: reference (samples padded with EOS, pads attended and counted, means over samples)")
    if config.sparsity_ratio:
        lines.append(f"pruning while measuring: {config.sparsity_ratio:g} of each row, by the Wanda metric")
    if _has_experts(job):
        fewest = fewest_tokens(job.options)
        lines.append(
            "experts: each on the tokens routed to it, weighted by its gate, divided by all tokens"
            + (f"; below {fewest} tokens (--expert_tokens) taken towards the mean of its layer" if fewest else "")
        )
        if config.sparsity_ratio:
            raise UserError(
                "sparsity_ratio prunes linear parts while measuring; the experts of a mixture would stay whole. Set "
                "sparsity_ratio: 0 in the pair config",
                "lewis-sparsity-experts",
            )
    lines += not_asked_lines(job)
    if _is_split(job):
        lines.append(
            f"tasks: one for each model, text and {job.batches_a_piece} micro-batches; each one's sums are added in their order"
        )
    elif job.batches_a_piece is not None:
        lines.append(
            "tasks: one for each model and text, since pruning needs all samples at every block, and blocks that differ and "
            "experts are measured in one go"
        )
    if any(subject.experts_apart for subject in job.subjects):
        lines.append("rounding: not tried, since it needs blocks whole")
    elif any(is_rounded(subject.dtype) for subject in job.subjects):
        lines.append(
            f"rounding: {SAMPLES} samples of each text go through the blocks in float32, too, which says how much of each "
            "delta is rounding"
        )
    return lines


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak of a model's pass, about."""
    found = [memory_estimate(subject) + _trial_weights(subject) for subject in job.subjects]
    if asked(job):
        for subject in job.subjects:
            found.append(snapshot_bytes(subject) // 2 + head_bytes(subject.decoder, subject.dtype.itemsize))
    return max(found)


def on_disk(job: MeasureJob) -> int:
    """Bytes of the snapshots that a run after a kill goes on from."""
    return job.side_by_side * max(snapshot_bytes(subject) + _trial_bytes(subject) for subject in job.subjects)


def _trial_weights(subject: Subject) -> int:
    """Bytes of the weights that the samples in float32 go through: of what lies outside the blocks, then of one block."""
    if subject.experts_apart or not is_rounded(subject.dtype):
        return 0
    body, blocks = (sum(map(torch.numel, one.parameters())) for one in (subject.decoder.body, subject.decoder.blocks))
    return torch.float32.itemsize * max(body - blocks, largest_block(subject))


def _trial_bytes(subject: Subject) -> int:
    """Of the samples that go through the blocks in float32, too: hidden states of both, and those before."""
    if not is_rounded(subject.dtype):
        return 0
    hidden = subject.decoder.model.config.get_text_config(decoder=True).hidden_size
    slots = max(trial_batch(text.batches).input_ids.numel() for text in subject.texts.values())
    return 2 * slots * hidden * (torch.float32.itemsize + subject.dtype.itemsize)


def measure(job: MeasureJob) -> Measured:
    """Norms of the base on every text and of each expert on its own."""
    _refuse_added_rows(job.base)
    require_own_tensors(job.base)
    config, gains = job.config, gains_before(job)
    users = {
        source: [one.type for one in config.experts if config.text_of(one.type) == source] for source in config.texts
    }
    measured = [
        _Text(subject, source, place, types[0], is_scored(job, subject, types))
        for place, (source, types) in enumerate(users.items())
        for subject in job.subjects
        if subject.entry.type in (config.base_model_type, *types)
    ]
    pieces = [_pieces(job, one) for one in measured]
    results = iter(job.run([piece for own in pieces for piece in own]))
    rows, routing, tokens, trials, losses = [], [], [], {}, {}
    for one, own in zip(measured, pieces, strict=True):
        found = [next(results) for _ in own]
        trials[one.subject.entry.type, one.label] = found[0]["trial"]
        losses[one.subject.entry.type, one.label] = [loss for part in found for loss in part["losses"]]
        if _is_split(job):
            rows += _rows(one, norms_of_ranges(one.subject.decoder, found, _divisor(job, one)), {})
        else:
            rows += _rows(one, found[0]["norms"], found[0]["stacks"])
            routing += found[0]["routing"]
            if one.subject.entry != config.base:
                tokens += _token_rows(one.subject, found[0]["stacks"])
    gains = gains or gains_of_passes(job, losses)
    norms = pd.DataFrame(rows)
    labels = {name: types[0] for types in users.values() for name in types}
    components = list(dict.fromkeys(norms["component"]))
    deltas, warnings = {}, accepted_doubts(gains)
    for entry in config.experts:
        own = norms[norms[TEXT] == labels[entry.type]]
        deltas[entry.type] = delta_table(own, entry.type, config.base_model_type, components)
        if not deltas[entry.type].to_numpy().any():
            warnings.append(f"{entry.name} has exactly the base's norms everywhere; is it the same model?")
    if not _has_experts(job):
        norms = norms.drop(columns=TOKENS)
    if len(config.texts) == 1:
        norms = norms.drop(columns=TEXT)
    files = table_files(deltas, norms, config.base_model_type)
    rounded = _rounding(job, trials, labels)
    return Measured(
        {**files, NOISE_TABLE.file: NOISE_TABLE.content(rounded.rows)},
        tuple(rounded.notes),
        (*warnings, *rounded.warnings),
        tuple(routing),
        tuple(tokens),
    )


@dataclass
class _Rounding:
    """What is known of rounding: rows of its table, notes and warnings."""

    rows: list[tuple] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _rounding(
    job: MeasureJob, trials: Mapping[tuple[str, str], Mapping[str, Any]], labels: Mapping[str, str]
) -> _Rounding:
    """How much of each expert's deltas is rounding, where that was tried.

    Args:
        job: the whole job.
        trials: by type of a model and label of a text.
        labels: the label of each expert's text.
    """
    found = _Rounding()
    for entry in job.config.experts:
        own, base = (trials[name, labels[entry.type]] for name in (entry.type, job.config.base_model_type))
        if own["norms"] and base["norms"]:
            noise = relative_noise(own["norms"], base["norms"])
            found.rows += [(entry.type, *place, value) for place, value in noise.items()]
            found.notes.append(noise_note(entry.type, noise, *own["seconds"]))
            found.warnings += noise_warnings(entry.type, noise)
    return found


def _token_rows(subject: Subject, stacks: Mapping[tuple[int, str], StackNorms]) -> Iterator[tuple]:
    """Rows of the table of experts' tokens; each mixture's from one of its stacks, all of which are given the same."""
    paths = {part.name: part.path for part in subject.decoder.components if part.is_stacked}
    counted = {(layer, paths[name]): one.tokens for (layer, name), one in stacks.items() if name in paths}
    for (layer, path), tokens in counted.items():
        if tokens is not None:
            yield from token_rows(subject.entry.type, layer, path, tokens.tolist())


def _refuse_added_rows(base: Subject) -> None:
    """Refuse, before weights are read, a model whose blocks see other rows than the tokens'."""
    text = next(iter(base.texts.values()))
    seen = dry_walk(base.decoder, text.encoded[0], f"model {base.entry.name}")
    if seen.rows_added:
        raise UserError(
            f"model {base.entry.name} gives its blocks {seen.rows_added} rows of its own beside each sample's tokens, and "
            "lewis takes means over tokens; use another --guidance, such as gram_mean",
            "model-unsupported",
        )


@dataclass(frozen=True)
class _Text:
    """A model on one of the texts; `place` is the text's number, `label` the first expert that is measured on it, `is_scored`
    whether the losses are wanted."""

    subject: Subject
    source: CalibrationSource
    place: int
    label: str
    is_scored: bool


def _has_experts(job: MeasureJob) -> bool:
    return any(part.is_stacked for part in job.base.decoder.components)


def _is_split(job: MeasureJob) -> bool:
    """Whether ranges of micro-batches are measured apart. Pruning needs all samples at every block."""
    is_plain = not (job.config.sparsity_ratio or job.base.decoder.partial or _has_experts(job))
    return job.batches_a_piece is not None and is_plain


def _divisor(job: MeasureJob, one: _Text) -> int:
    text = one.subject.texts[one.source]
    return len(text.encoded) if job.config.parity else text.tokens


def _pieces(job: MeasureJob, one: _Text) -> list[Piece]:
    """All of a model on a text, or a piece for each range of micro-batches."""
    subject, text = one.subject, one.subject.texts[one.source]
    label, blocks = subject.entry.type, len(subject.decoder.blocks)
    if not _is_split(job):
        own = job.of(replace(subject, texts={one.source: text}))
        base = None if subject.entry == job.config.base else replace(job.base, texts={})
        arguments = (own, _divisor(job, one), base, one.is_scored)
        return [Piece(f"{label}+{one.place}", measured_norms, arguments, blocks, label, types=(StackNorms,))]
    starts = range(0, len(text.batches), job.batches_a_piece)
    found = []
    for start in starts:
        batches = text.batches[start : start + job.batches_a_piece]
        own = job.of(replace(subject, texts={one.source: EncodedText([], batches)}))
        found.append(Piece(f"{label}+{one.place}+{start}", range_sums, (own, start == 0, one.is_scored), blocks, label))
    return found


def _rows(
    one: _Text, norms: Mapping[tuple[int, str], torch.Tensor], stacks: Mapping[tuple[int, str], StackNorms]
) -> list[dict[str, Any]]:
    subject, rows = one.subject, []
    for layer in range(len(subject.decoder.blocks)):
        for component in subject.decoder.components_of(layer):
            for part, norm, tokens in _taken(subject, norms, stacks, layer, component):
                rows.append(
                    {
                        "model": subject.entry.type,
                        "layer": layer,
                        "component": part.name,
                        "tensor": part.tensor,
                        "norm": _finite(subject, part.tensor, float(norm)),
                        "params": math.prod(subject.checkpoint.tensors[part.tensor].shape),
                        TOKENS: subject.texts[one.source].tokens if tokens is None else tokens,
                        TEXT: one.label,
                    }
                )
    return rows


def _taken(
    subject: Subject,
    norms: Mapping[tuple[int, str], torch.Tensor],
    stacks: Mapping[tuple[int, str], StackNorms],
    layer: int,
    component: Component,
) -> Iterator[tuple[StoredPart, torch.Tensor, int | None]]:
    """The stored tensors of a component with their norms, and for experts how many tokens theirs had (the fewest)."""
    place = layer, component.name
    parts = subject.parts(layer, component)
    if place in norms:
        yield parts[0], norms[place], None
    elif place in stacks:
        stack = stacks[place]
        if stack.tokens is None:
            yield from ((part, stack.norms[part.tensor], None) for part in parts)
            return
        counts = [int(count) for count in stack.tokens.tolist()]
        conversion = subject.layout.conversions.get(subject.decoder.weight_name(layer, component))
        own = [None] if conversion is None else conversion.ordinals  # one tensor holds all experts, or each has its own
        for part, expert in zip(parts, own, strict=True):
            yield part, stack.norms[part.tensor], min(counts) if expert is None else counts[expert]


def _finite(subject: Subject, tensor: str, value: float) -> float:
    if not value < float("inf"):
        raise UserError(
            f"model {subject.entry.name}: the norm of {tensor} is {value}: its weights or its inputs are not "
            f"finite in {subject.dtype}; check the checkpoint, or use --dtype float32 or bfloat16",
            "measured-not-finite",
        )
    return value
