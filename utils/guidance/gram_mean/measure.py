"""gram_mean, measure half: losses, Gram matrices and squared gradients of every expert on its own text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.guidance.gram_mean.method import ACCEPT, LOSSES, TENSORS, gram_file
from utils.guidance.gram_mean.pair_pass import PairPart, PairSide, pair_pass
from utils.guidance.gram_mean.tables import LOSS_TABLE, TENSOR_TABLE
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.text_gain import TextGain, refuse_useless_text, text_gain
from utils.models.decoder import is_transposed, weight_matrix
from utils.passes.language_head import require_head
from utils.passes.subjects import Subject, first_stored_name
from utils.recipes.gram_file import GramFileWriter
from utils.runtime import gigabytes
from utils.workers.piece import Piece, Place


@dataclass(frozen=True)
class ExpertGrams:
    """What one expert's pass gave beside its file: rows of the two tables, and its gain."""

    tensors: list[tuple]
    losses: list[tuple]
    gain: TextGain


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    parts = job.base.decoder.components
    widths = {part.name: weight_matrix(job.base.decoder.blocks[0].get_submodule(part.path)).shape[1] for part in parts}
    disk = max(_file_bytes(expert) for expert in job.experts)
    lines = [
        f"components: {', '.join(widths)} ({'as configured' if job.config.components else 'every linear part of a block'})"
        "; squared gradients of every parameter, at the base and at each expert",
        f"disk: at most {gigabytes(disk)} an expert for Gram matrices of inputs and gradients",
    ]
    for expert in job.experts:
        tokens = job.text(expert, expert).tokens
        short = {name: width for name, width in widths.items() if width > tokens}
        if short:
            lines.append(
                f"{expert.entry.type}: {tokens} tokens are fewer than the input channels of "
                f"{', '.join(f'{name} ({width})' for name, width in short.items())}: directions without inputs will be "
                f"merged by the guided mean; from {max(short.values())} tokens on there need be none"
            )
    return lines


def measure(job: MeasureJob) -> Measured:
    """One file of matrices for each expert, and the tables."""
    pieces = []
    for expert in job.experts:
        for subject in (job.base, expert):
            if subject.headers is not None:
                require_head(subject.decoder, subject.headers, f"model {subject.entry.name}")
        name, blocks, own = expert.entry.type, 4 * len(expert.decoder.blocks), job.of(job.base, expert)
        pieces.append(Piece(name, _measure_expert, (own,), blocks, name, types=(ExpertGrams, TextGain)))
    found: list[ExpertGrams] = job.run(pieces)
    files: dict[str, bytes | Path] = {
        TENSORS: TENSOR_TABLE.content(row for one in found for row in one.tensors),
        LOSSES: LOSS_TABLE.content(row for one in found for row in one.losses),
    }
    names = [expert.entry.type for expert in job.experts]
    files |= {gram_file(name): job.workspace / name / gram_file(name) for name in names}
    notes = [
        f"{name}: loss {one.gain.base:.4f} at the base, {one.gain.expert:.4f} at the expert (nats per token on its own "
        f"text, {one.gain.samples} samples)"
        for name, one in zip(names, found, strict=True)
    ]
    doubts = [
        f"{name} has no sure gain over the base on its own text, which was accepted by --{ACCEPT}"
        for name, one in zip(names, found, strict=True)
        if not one.gain.is_sure
    ]
    return Measured(files, tuple(notes), tuple(doubts))


def _measure_expert(place: Place, job: MeasureJob) -> ExpertGrams:
    subjects = _, expert = job.subjects
    name = expert.entry.type
    samples = [job.text(subject, expert).encoded for subject in subjects]
    sides = [
        PairSide(subject.decoder, job.open_weights(subject, place.device), ids)
        for subject, ids in zip(subjects, samples, strict=True)
    ]
    tensors: list[tuple] = []
    with pair_pass(*sides, place.device, place.on_step) as both:
        predicted = [len(ids) - 1 for ids in samples[1]]
        gain = text_gain(predicted, *both.losses)
        if not job.options[ACCEPT]:
            refuse_useless_text(f"model {expert.entry.name} ({name})", gain, ACCEPT)
        with GramFileWriter(place.folder / gram_file(name), _names(subjects)) as file:
            for part in both.parts:
                try:
                    tensors += _written(file, part, subjects)
                except ValueError as error:
                    raise UserError(
                        f"{expert.entry.name}, its inputs or gradients are not finite in {expert.dtype} ({error}); check "
                        "the checkpoints, or use --dtype float32 or bfloat16",
                        "measure-not-finite",
                    ) from error
    losses = [(name, row, *values) for row, values in enumerate(zip(predicted, *both.losses, strict=True))]
    return ExpertGrams(sorted(tensors, key=lambda row: row[1]), losses, gain)


def _names(subjects: Sequence[Subject]) -> set[str]:
    """The names in the checkpoints of everything that may be written."""
    parameters = {name for one in subjects for name, _ in one.decoder.model.named_parameters(remove_duplicate=False)}
    return {first_stored_name(subjects, name) for name in parameters}


def _written(file: GramFileWriter, part: PairPart, subjects: Sequence[Subject]) -> list[tuple]:
    """Write a part; rows of the table of tensors."""
    base, rows = subjects[0], []
    for shared in part.inputs:
        names = [base.decoder.weight_name(part.layer, component) for component in shared.components]
        stored = [base.stored_name(name) for name in names]
        module = base.decoder.blocks[part.layer].get_submodule(shared.components[0].path)
        file.add_inputs(stored[0], 0 if is_transposed(module) else 1, shared.gram, stored[1:])
        for component, name, tensor in zip(shared.components, names, stored, strict=True):
            shape = part.shapes[name]
            place = (subjects[1].entry.type, part.layer, component.name, tensor, shape[0] * shape[1])
            rows.append((*place, len(shared.gram), shared.tokens))
    for name, axes in part.axes.items():
        file.add_axes(first_stored_name(subjects, name), axes)
    for name, gram in part.rows.items():
        file.add_rows(first_stored_name(subjects, name), gram)
    return rows


def _file_bytes(expert: Subject) -> int:
    """Most bytes of the matrices of an expert: those of layers that share their inputs are counted for each."""
    decoder, total = expert.decoder, 0
    for component in decoder.components:
        width = weight_matrix(decoder.blocks[0].get_submodule(component.path)).shape[1]
        total += len(decoder.blocks) * 2 * width * (width + 1)
    width = decoder.model.get_input_embeddings().weight.shape[1]
    return total + 4 * width * (width + 1)
