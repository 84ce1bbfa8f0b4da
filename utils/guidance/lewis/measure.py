"""LEWIS, measure half: norms of the base and the experts, and the delta tables they make."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from utils.errors import UserError
from utils.guidance.lewis.deltas import delta_table
from utils.guidance.lewis.ranges import RangeVisitor, norms_of_ranges
from utils.guidance.lewis.tables import TEXT, table_files
from utils.guidance.lewis.visitor import LewisVisitor
from utils.guidance.measure_job import Measured, MeasureJob
from utils.pair.source import CalibrationSource
from utils.passes.block_runner import run_blocks
from utils.passes.subjects import EncodedText, Subject
from utils.workers.piece import Piece, Place


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    config = job.config
    names = ", ".join(part.name for part in job.base.decoder.components)
    lines = [f"components: {names} ({'as configured' if config.components else 'every linear part of a block'})"]
    if config.parity:
        lines.append("parity: reference (samples padded with EOS, pads attended and counted, means over samples)")
    if config.sparsity_ratio:
        lines.append(f"pruning while measuring: {config.sparsity_ratio:g} of each row, by the Wanda metric")
    if _is_split(job):
        lines.append(
            f"tasks: one for each model, text and {job.batches_a_piece} micro-batches; each one's sums are added in their order"
        )
    elif job.batches_a_piece is not None:
        lines.append("tasks: one for each model and text, since pruning needs all samples at every block")
    return lines


def measure(job: MeasureJob) -> Measured:
    """Norms of the base on every text and of each expert on its own."""
    config = job.config
    users = {
        source: [one.type for one in config.experts if config.text_of(one.type) == source] for source in config.texts
    }
    measured = [
        _Text(subject, source, place, types[0])
        for place, (source, types) in enumerate(users.items())
        for subject in job.subjects
        if subject.entry.type in (config.base_model_type, *types)
    ]
    pieces = [_pieces(job, one) for one in measured]
    results = iter(job.run([piece for own in pieces for piece in own]))
    rows = []
    for one, own in zip(measured, pieces, strict=True):
        norms = [next(results) for _ in own]
        if _is_split(job):
            rows += _rows(one, norms_of_ranges(one.subject.decoder, norms, _divisor(job, one)))
        else:
            rows += _rows(one, norms[0])
    norms = pd.DataFrame(rows)
    labels = {name: types[0] for types in users.values() for name in types}
    components = list(dict.fromkeys(norms["component"]))
    deltas, warnings = {}, []
    for entry in config.experts:
        own = norms[norms[TEXT] == labels[entry.type]]
        deltas[entry.type] = delta_table(own, entry.type, config.base_model_type, components)
        if not deltas[entry.type].to_numpy().any():
            warnings.append(f"{entry.name} has exactly the base's norms everywhere; is it the same model?")
    if len(config.texts) == 1:
        norms = norms.drop(columns=TEXT)
    return Measured(table_files(deltas, norms, config.base_model_type), warnings=tuple(warnings))


@dataclass(frozen=True)
class _Text:
    """A model on one of the texts; `place` is the text's number, `label` the first expert that is measured on it."""

    subject: Subject
    source: CalibrationSource
    place: int
    label: str


def _is_split(job: MeasureJob) -> bool:
    """Whether ranges of micro-batches are measured apart. Pruning needs all samples at every block."""
    return job.batches_a_piece is not None and not job.config.sparsity_ratio


def _divisor(job: MeasureJob, one: _Text) -> int:
    text = one.subject.texts[one.source]
    return len(text.encoded) if job.config.parity else text.tokens


def _pieces(job: MeasureJob, one: _Text) -> list[Piece]:
    """All of a model on a text, or a piece for each range of micro-batches."""
    subject, text = one.subject, one.subject.texts[one.source]
    label, blocks = subject.entry.type, len(subject.decoder.blocks)
    if not _is_split(job):
        own = job.of(replace(subject, texts={one.source: text}))
        return [Piece(f"{label}+{one.place}", _norms, (own, _divisor(job, one)), blocks, label)]
    starts = range(0, len(text.batches), job.batches_a_piece)
    found = []
    for start in starts:
        batches = text.batches[start : start + job.batches_a_piece]
        own = job.of(replace(subject, texts={one.source: EncodedText([], batches)}))
        found.append(Piece(f"{label}+{one.place}+{start}", _sums, (own, start == 0), blocks, label))
    return found


def _norms(place: Place, job: MeasureJob, divisor: int) -> dict[tuple[int, str], torch.Tensor]:
    """Norms by layer and component of one model on one text."""
    (subject,) = job.subjects
    (text,) = subject.texts.values()
    visitor = LewisVisitor(subject.decoder, text.tokens, divisor, job.config.sparsity_ratio)
    weights = job.open_weights(subject, place.device)
    run_blocks(subject.decoder, weights, text.batches, visitor, place.device, on_block=place.on_step)
    return {key: norm.cpu() for key, norm in visitor.norms.items()}


def _sums(place: Place, job: MeasureJob, squares: bool) -> dict[str, Any]:
    """Sums of one model over one range of a text (`RangeVisitor.result`)."""
    (subject,) = job.subjects
    (text,) = subject.texts.values()
    visitor = RangeVisitor(subject.decoder, text.tokens, squares=squares)
    weights = job.open_weights(subject, place.device)
    run_blocks(subject.decoder, weights, text.batches, visitor, place.device, on_block=place.on_step)
    return visitor.result()


def _rows(one: _Text, norms: Mapping[tuple[int, str], torch.Tensor]) -> list[dict[str, Any]]:
    subject, rows = one.subject, []
    for (layer, name), norm in norms.items():
        component = next(part for part in subject.decoder.components if part.name == name)
        weight = subject.decoder.weight_name(layer, component)
        value = float(norm)
        if not value < float("inf"):
            raise UserError(
                f"model {subject.entry.name}: the norm of {weight} is {value}: its weights or its inputs are not "
                f"finite in {subject.dtype}; check the checkpoint, or use --dtype float32 or bfloat16",
                "measured-not-finite",
            )
        rows.append(
            {
                "model": subject.entry.type,
                "layer": layer,
                "component": name,
                "tensor": subject.stored_name(weight),
                "norm": value,
                "params": subject.decoder.blocks[layer].get_submodule(component.path).weight.numel(),
                TEXT: one.label,
            }
        )
    return rows
