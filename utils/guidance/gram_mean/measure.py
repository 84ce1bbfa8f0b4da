"""gram_mean, measure half: losses, Gram matrices and squared gradients of every expert on its own text."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError
from utils.guidance.gram_mean import rounds
from utils.guidance.gram_mean.input_pass import SharedInputs, Side, input_pass
from utils.guidance.gram_mean.joint_pass import joint_pass
from utils.guidance.gram_mean.method import LOSSES, ROUNDS, TENSORS, gram_file
from utils.guidance.gram_mean.tables import LOSS_TABLE, TENSOR_TABLE
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.routing import compared_routers, keep_routing, routing_rows
from utils.guidance.text_gain import ACCEPT, TextGain, refuse_useless_text, text_gain
from utils.models.decoder import Component, is_transposed, weight_matrix
from utils.passes.block_gradients import Observing, nothing
from utils.passes.gradient_memory import gradient_memory
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.language_head import require_head
from utils.passes.routing import RouterComparison
from utils.passes.subjects import StoredPart, Subject, first_stored_name, snapshot_bytes, stored_as
from utils.recipes.gram_file import GramFileWriter
from utils.runtime import gigabytes
from utils.workers.piece import Piece, Place


@dataclass(frozen=True)
class ExpertGrams:
    """What one expert's pass gave beside its file: rows of the two tables and of the one of routers, and its gain."""

    tensors: list[tuple]
    losses: list[tuple]
    routing: list[tuple]
    gain: TextGain


@dataclass(frozen=True)
class _Models:
    """The models of one expert's work."""

    base: Subject
    expert: Subject

    @property
    def named(self) -> tuple[Subject, Subject]:
        """Those whose gradients are taken and whose checkpoints name the tensors."""
        return self.base, self.expert


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    decoder = job.base.decoder
    widths = {
        part.name: weight_matrix(decoder.blocks[layer].get_submodule(part.path)).shape[1]
        for layer in range(len(decoder.blocks))
        for part in decoder.components_of(layer)
        if not part.is_stacked
    }
    disk = max(_file_bytes(expert) for expert in job.experts)
    lines = [
        f"components: {', '.join(widths)} ({'as configured' if job.config.components else 'every linear part of a block'})"
        f", inputs at base and expert; squared gradients of every parameter, at the base and at each expert",
        f"disk: at most {gigabytes(disk)} an expert for Gram matrices of inputs and gradients",
    ]
    if job.options[ROUNDS] > 1:
        lines.append(
            f"rounds: {job.options[ROUNDS]}; from the second on the inputs are those of what the round before gives, which is merged in "
            f"--out_dir ({gigabytes(job.base.checkpoint.total_bytes)}) meanwhile"
        )
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


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak, about: of an expert's pass with both models and one block's Gram matrices of both, or
    of the merge between two rounds."""
    found = [rounds.merging_bytes(job)]
    for expert in job.experts:
        base, own = (gradient_memory(one, job.text(one, expert).encoded) for one in (job.base, expert))
        grams = max(_gram_bytes(block) for block in job.base.decoder.blocks)
        found.append(base.held + own.peak(2 * grams))
    return max(found)


def waiting(job: MeasureJob) -> int:
    """Bytes that wait for the way back of the passes that are made at a time, at most."""
    return job.experts_at_a_time * max(
        sum(gradient_memory(one, job.text(one, expert).encoded).waiting for one in (job.base, expert))
        for expert in job.experts
    )


def on_disk(job: MeasureJob) -> int:
    """Bytes of every expert's matrices in every round, of the files with names in which hidden states wait, of the snapshots
    beside them, and of a merged model."""
    snapshot, count = max(snapshot_bytes(subject) for subject in job.subjects), job.options[ROUNDS]
    merged = job.base.checkpoint.total_bytes if count > 1 else 0
    return count * sum(map(_file_bytes, job.experts)) + waiting(job) + job.experts_at_a_time * 2 * snapshot + merged


def _gram_bytes(block: nn.Module) -> int:
    """Of the inputs and of the gradients' rows of each matrix, float32."""
    matrices = [value for value in block.parameters() if value.dim() == 2]
    return 4 * sum(rows * rows + columns * columns for rows, columns in (value.shape for value in matrices))


def measure(job: MeasureJob) -> Measured:
    """One file of matrices for each expert, and the tables."""
    rounds.refuse_one_expert(job)
    pieces = []
    for expert in job.experts:
        for subject in (job.base, expert):
            require_head(subject.decoder, subject.layout, f"model {subject.entry.name}")
        name, blocks = expert.entry.type, 4 * len(expert.decoder.blocks)
        pieces.append(
            Piece(name, _measure_expert, (job.of(job.base, expert),), blocks, name, types=(ExpertGrams, TextGain))
        )
    found: list[ExpertGrams] = job.run(pieces)
    files = _files(job, found, "")
    for number in range(1, job.options[ROUNDS]):
        with rounds.merged_subject(job, number, files) as merged:
            found = job.run(
                [_again(job, expert, merged, one, number) for expert, one in zip(job.experts, found, strict=True)]
            )
        files = _files(job, found, f"+{number}")
    names = [expert.entry.type for expert in job.experts]
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
    return Measured(files, tuple(notes), tuple(doubts), tuple(row for one in found for row in one.routing))


def _files(job: MeasureJob, found: Sequence[ExpertGrams], end: str) -> dict[str, bytes | Path]:
    """The tables, and the files of the pieces whose names have an end."""
    assert job.workspace is not None
    names = [expert.entry.type for expert in job.experts]
    return {
        TENSORS: TENSOR_TABLE.content(row for one in found for row in one.tensors),
        LOSSES: LOSS_TABLE.content(row for one in found for row in one.losses),
        **{gram_file(name): job.workspace / f"{name}{end}" / gram_file(name) for name in names},
    }


def _again(job: MeasureJob, expert: Subject, merged: Subject, found: ExpertGrams, number: int) -> Piece:
    """The piece that takes an expert's inputs at a merged model; all else is as the round before found it."""
    assert job.workspace is not None
    name, blocks = expert.entry.type, len(expert.decoder.blocks)
    earlier = job.workspace / (name if number == 1 else f"{name}+{number - 1}") / gram_file(name)
    arguments = (job.of(job.base, expert, merged), found, earlier)
    return Piece(f"{name}+{number}", _measure_inputs, arguments, blocks, name, types=(ExpertGrams, TextGain))


def _side(place: Place, job: MeasureJob, subject: Subject, expert: Subject, observing: Observing = nothing) -> Side:
    weights = job.open_weights(subject, place.device)
    return Side(subject.decoder, weights, job.text(subject, expert).encoded, observing)


def _measure_expert(place: Place, job: MeasureJob) -> ExpertGrams:
    models, device = _Models(*job.subjects), place.device
    expert, name = models.expert, models.expert.entry.type
    predicted = [len(ids) - 1 for ids in job.text(expert, expert).encoded]
    snapshots = GradientSnapshots(place.snapshot)
    tensors, begun = snapshots.found("measured") or ([], None)
    path = snapshots.growing_file("grams") or place.folder / gram_file(name)
    with (
        _kept_routers(job, models, device, snapshots) as routers,
        joint_pass(
            [_side(place, job, models.base, expert), _side(place, job, expert, expert, routers.attached)],
            device,
            place.on_step,
            split=models.base.layout.pieces,
            folder=place.folder,
            snapshots=snapshots,
        ) as both,
    ):
        gain = text_gain(predicted, *both.losses)
        if not job.options[ACCEPT]:
            refuse_useless_text(f"model {expert.entry.name} ({name})", gain, ACCEPT)
        with GramFileWriter(path, _names(models), begun) as file, _finite(expert):
            snapshots.grow("grams", file.sync)
            snapshots.keep("measured", lambda: (tensors, file.state()))
            for part in both.parts:
                tensors.extend(_write_inputs(file, part.layer, part.inputs, models))
                for parameter, axes in part.axes.items():
                    if (stored := _stored_alone(models, parameter)) is not None:
                        file.add_axes(stored, axes)
                for parameter, gram in part.rows.items():
                    file.add_rows(first_stored_name(models.named, parameter), gram)
        routing = routing_rows(name, routers)
        os.replace(path, place.folder / gram_file(name))
        snapshots.forget()
    rows = [(name, row, *values) for row, values in enumerate(zip(predicted, *both.losses, strict=True))]
    return ExpertGrams(sorted(tensors, key=lambda row: row[1]), rows, routing, gain)


def _measure_inputs(place: Place, job: MeasureJob, found: ExpertGrams, earlier: Path) -> ExpertGrams:
    """An expert's matrices with the inputs of a merged model; `found` and the file `earlier` are of the round before."""
    base, expert, merged = job.subjects
    models, tensors = _Models(base, expert), []
    with GramFileWriter(place.folder / gram_file(expert.entry.type), _names(models)) as file, _finite(expert):

        def on_inputs(layer: int, inputs: tuple[SharedInputs, ...]) -> None:
            tensors.extend(_write_inputs(file, layer, inputs, models))

        input_pass(_side(place, job, merged, expert), place.device, place.on_step, on_inputs)
        file.add_gradients(earlier)
    return replace(found, tensors=tensors)


@contextlib.contextmanager
def _kept_routers(
    job: MeasureJob, models: _Models, device: torch.device, snapshots: GradientSnapshots
) -> Iterator[RouterComparison]:
    with compared_routers(job, models.expert, models.base, device) as routers:
        keep_routing(snapshots, routers, device)
        yield routers


@contextlib.contextmanager
def _finite(expert: Subject) -> Iterator[None]:
    """Say what it means where the file refuses numbers."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{expert.entry.name}, its inputs or gradients are not finite in {expert.dtype} ({error}); check the "
            "checkpoints, or use --dtype float32 or bfloat16",
            "measure-not-finite",
        ) from error


def _stored_alone(models: _Models, name: str) -> str | None:
    """The stored tensor that a parameter, or a piece of one, is; None where it is only a part of one, or several."""
    if name in models.base.checkpoint.tensors:
        return name
    layout, own = stored_as(models.named, name)
    stored = layout.stored_names(own)
    return stored[0] if len(stored) == 1 and not layout.is_part(own) else None


def _names(models: _Models) -> set[str]:
    """The names in the checkpoints of everything that may be written."""
    found = set()
    for subject in models.named:
        for name, _ in subject.decoder.model.named_parameters(remove_duplicate=False):
            layout, own = stored_as(models.named, name)
            found.update(layout.stored_names(own))
    return found


def _write_inputs(
    file: GramFileWriter, layer: int | None, inputs: Sequence[SharedInputs], models: _Models
) -> Iterator[tuple]:
    """Write a block's Gram matrices of inputs; rows of the table of tensors."""
    base = models.base
    for shared in inputs:
        stored = [part for component in shared.components for part in _with_the_same_inputs(base, layer, component)]
        if not stored:
            continue
        module = base.decoder.blocks[layer].get_submodule(shared.components[0].path)
        file.add_inputs(
            stored[0].tensor, 0 if is_transposed(module) else 1, shared.gram, [one.tensor for one in stored[1:]]
        )
        for part in stored:
            params = math.prod(base.checkpoint.tensors[part.tensor].shape)
            yield models.expert.entry.type, layer, part.name, part.tensor, params, len(shared.gram), shared.tokens


def _with_the_same_inputs(base: Subject, layer: int, component: Component) -> list[StoredPart]:
    """The stored tensors of a linear part that have its inputs: itself, or the pieces it is stored in."""
    name = base.decoder.weight_name(layer, component)
    if base.layout.is_part(name) or not base.layout.can_split(name):
        return []
    return base.parts(layer, component)


def _file_bytes(expert: Subject) -> int:
    """Most bytes of the matrices of an expert: those of layers that share their inputs are counted for each."""
    decoder, total = expert.decoder, 0
    for layer, block in enumerate(decoder.blocks):
        for component in decoder.components_of(layer):
            if not component.is_stacked:
                width = weight_matrix(block.get_submodule(component.path)).shape[1]
                total += 2 * width * (width + 1)
    width = decoder.model.get_input_embeddings().weight.shape[1]
    return total + 4 * width * (width + 1)
