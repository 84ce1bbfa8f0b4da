"""gram_mean, measure half: losses, Gram matrices and squared gradients of every expert on its own text."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from utils.errors import UserError
from utils.guidance.expert_tokens import token_rows
from utils.guidance.few_tokens import EXPERT_TOKENS, fewest_tokens
from utils.guidance.gram_mean.expert_file import (
    BaseAndExpert,
    ExpertGrams,
    names_written,
    piece_name,
    said_if_not_finite,
    side_of,
    stored_alone,
    write_inputs,
)
from utils.guidance.gram_mean.joint_pass import JointPass, joint_pass
from utils.guidance.gram_mean.method import EXPERT_INPUTS, LOSSES, ROUNDS, TENSORS, gram_file
from utils.guidance.gram_mean.tables import LOSS_TABLE, TENSOR_TABLE
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.own_text import Answer, accepted_doubts, gains_on_own_text
from utils.guidance.routing import compared_routers, keep_routing, routing_rows
from utils.guidance.text_gain import EQUAL_WEIGHTS
from utils.models.decoder import weight_matrix
from utils.passes.expert_grams import stack_bytes
from utils.passes.gradient_memory import beside_two, gradient_memory
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.language_head import require_head
from utils.passes.routing import RouterComparison
from utils.passes.subjects import Subject, first_stored_name, snapshot_bytes
from utils.recipes.gram_file import GramFileWriter
from utils.runtime import available_bytes, device_name, gigabytes
from utils.workers.piece import Piece, Place


def check(job: MeasureJob) -> None:
    """Refuse rounds that no merge lies between, and experts whose matrices of one block do not fit. Raises a `UserError`."""
    if job.options[ROUNDS] > 1:
        _rounds().check(job)
    needed = 2 * _largest_stacks(job)
    if needed and job.workers is None and needed > (free := available_bytes(job.devices[0])):
        raise UserError(
            f"model {job.base.entry.name}: the Gram matrices of the inputs of a block's experts take {gigabytes(needed)} at base "
            f"and expert, and {device_name(job.devices[0])} has {gigabytes(free)} free; give --no-{EXPERT_INPUTS}, which has "
            "the experts merged by the guided mean, or use --device cpu or a machine with more",
            "measure-experts-too-large",
        )


def depends_on(job: MeasureJob) -> dict[str, Any]:
    """What several rounds depend on beside the usual, as plain data."""
    return _rounds().depends_on(job) if job.options[ROUNDS] > 1 else {}


def _rounds() -> ModuleType:
    """The one late import of what merges: mergekit comes with it."""
    from utils.guidance.gram_mean import rounds

    return rounds


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    decoder = job.base.decoder
    widths = {
        part.name: weight_matrix(decoder.blocks[layer].get_submodule(part.path)).shape[1]
        for layer in range(len(decoder.blocks))
        for part in decoder.components_of(layer)
        if not part.is_stacked
    }
    disk = max(_file_bytes(job, expert) for expert in job.experts)
    lines = [
        f"components: {', '.join(widths)} ({'as configured' if job.config.components else 'every linear part of a block'})"
        f", inputs at base and expert; squared gradients of every parameter, at the base and at each expert",
        f"disk: at most {gigabytes(job.options[ROUNDS] * disk)} an expert for Gram matrices of inputs and gradients",
    ]
    fewest = fewest_tokens(job.options)
    if stacked := [part.name for part in decoder.components if part.is_stacked]:
        few = f"; below {fewest} (--{EXPERT_TOKENS}) taken towards the mean of its layer" if fewest else ""
        lines.append(
            f"experts of the mixture ({', '.join(stacked)}): {_of_experts(job)}; squared gradients of each{few}"
        )
    if job.options[ROUNDS] > 1:
        lines.append(
            f"rounds: {job.options[ROUNDS]}; from the second on the inputs are those of what the round before gives, which "
            f"is merged in --out_dir meanwhile ({gigabytes(job.base.checkpoint.total_bytes)})"
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


def _of_experts(job: MeasureJob) -> str:
    if not job.options[EXPERT_INPUTS]:
        return (
            "no Gram matrices of their inputs; they are merged by the guided mean, weighed by the squared gradients of each "
            "expert's own tokens"
        )
    disk = sum(stack_bytes(job.base.decoder, layer)[1] for layer in range(len(job.base.decoder.blocks)))
    return (
        f"inputs of the tokens routed to each; of the disk about {gigabytes(disk)} are theirs, of memory "
        f"{gigabytes(2 * _largest_stacks(job))} (--no-{EXPERT_INPUTS} leaves them out and merges experts by the guided mean)"
    )


def _largest_stacks(job: MeasureJob) -> int:
    """Bytes of the Gram matrices of one block's experts, of one model."""
    decoder = job.base.decoder
    wanted = job.options[EXPERT_INPUTS]
    return max(stack_bytes(decoder, layer)[0] for layer in range(len(decoder.blocks))) if wanted else 0


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak, about: of an expert's pass with both models and one block's Gram matrices of both, or
    of the merge between two rounds."""
    found = [_rounds().merging_bytes(job)] if job.options[ROUNDS] > 1 else []
    for expert in job.experts:
        base, own = (gradient_memory(one, job.text(one, expert).encoded) for one in (job.base, expert))
        grams = max(_gram_bytes(block) for block in job.base.decoder.blocks) + _largest_stacks(job)
        found.append(base.held + own.peak(2 * grams) + beside_two(job.devices[0]))
    return max(found)


def waiting(job: MeasureJob) -> int:
    """Bytes that wait for the way back of the passes that are made at a time, at most."""
    return job.experts_at_a_time * max(_waiting(job, expert) for expert in job.experts)


def _waiting(job: MeasureJob, expert: Subject) -> int:
    return sum(gradient_memory(one, job.text(one, expert).encoded).waiting for one in (job.base, expert))


def on_disk(job: MeasureJob) -> int:
    """Bytes of every expert's matrices in every round, of the files with names in which hidden states wait, of the snapshots
    beside them, and of a merged model.

    Where the file system has no hard links, files are copied for the merge between two rounds; those copies are gone before the
    files of the round after it come, which take as much.
    """
    snapshot = max(snapshot_bytes(subject) for subject in job.subjects)
    merged = job.base.checkpoint.total_bytes if job.options[ROUNDS] > 1 else 0
    return left_on_disk(job) + waiting(job) + job.experts_at_a_time * 2 * snapshot + merged


def left_on_disk(job: MeasureJob) -> int:
    """Bytes of every expert's matrices in every round."""
    return job.options[ROUNDS] * sum(_file_bytes(job, expert) for expert in job.experts)


def _gram_bytes(block: nn.Module) -> int:
    """Of the inputs and of the gradients' rows of each matrix, float32."""
    matrices = [value for value in block.parameters() if value.dim() == 2]
    return 4 * sum(rows * rows + columns * columns for rows, columns in (value.shape for value in matrices))


def measure(job: MeasureJob) -> Measured:
    """One file of matrices for each expert, and the tables."""
    pieces, left = [], sum(_waiting(job, expert) for expert in job.experts)
    for expert in job.experts:
        for subject in (job.base, expert):
            require_head(subject.decoder, subject.layout, f"model {subject.entry.name}")
        name, blocks = expert.entry.type, 4 * len(expert.decoder.blocks)
        pieces.append(Piece(name, _measure_expert, (job.of(job.base, expert),), blocks, name, types=(ExpertGrams,)))
    gains = gains_on_own_text(job, job.experts, _ask, then=EQUAL_WEIGHTS, left=left, least=on_disk(job)).gains
    found: list[ExpertGrams] = job.run(pieces)
    files = _files(job, found, 0)
    for number in range(1, job.options[ROUNDS]):
        found = _rounds().measured_again(job, number, files, found)
        files = _files(job, found, number)
    notes = [
        f"{name}: loss {gain.base:.4f} at the base, {gain.expert:.4f} at the expert (nats per token on its own text, "
        f"{gain.samples} sample{'' if gain.samples == 1 else 's'})"
        for name, gain in gains.items()
    ]
    doubts = [*accepted_doubts(gains, EQUAL_WEIGHTS), *_without_inputs(job, found)]
    routing = tuple(row for one in found for row in one.routing)
    tokens = tuple(row for one in found for row in one.expert_tokens)
    return Measured(files, tuple(notes), tuple(doubts), routing, tokens)


def _without_inputs(job: MeasureJob, found: Sequence[ExpertGrams]) -> list[str]:
    """A sentence if matrices of experts have no inputs that were asked for."""
    decoder, measured = job.base.decoder, {row[3] for one in found for row in one.tensors}
    names = [
        part.tensor
        for layer in range(len(decoder.blocks))
        for component in decoder.components_of(layer)
        if component.is_stacked and job.options[EXPERT_INPUTS]
        for part in job.base.parts(layer, component)
        if part.tensor not in measured
    ]
    if not names:
        return []
    return [
        f"{len(names)} tensors of experts, {names[0]} the first, have no Gram matrices of inputs: this architecture does not "
        "compute experts one after the other, or stores them in another form; they are merged by the guided mean"
    ]


def _files(job: MeasureJob, found: Sequence[ExpertGrams], number: int) -> dict[str, bytes | Path]:
    """The tables, and the files of the pieces of the round after `number` others."""
    assert job.workspace is not None
    names = [expert.entry.type for expert in job.experts]
    return {
        TENSORS: TENSOR_TABLE.content(row for one in found for row in one.tensors),
        LOSSES: LOSS_TABLE.content(row for one in found for row in one.losses),
        **{gram_file(name): job.workspace / piece_name(name, number) / gram_file(name) for name in names},
    }


def _ask(place: Place, job: MeasureJob) -> Answer:
    """The way there of `_measure_expert`."""
    snapshots = GradientSnapshots(place.snapshot)
    with _there(place, job, snapshots) as (both, _):
        snapshots.write()
        return Answer(*both.losses)


@contextlib.contextmanager
def _there(place: Place, job: MeasureJob, snapshots: GradientSnapshots) -> Iterator[tuple[JointPass, RouterComparison]]:
    """Base and expert at the end of the way there, with what compares their routers on the way back."""
    (base, expert), device = job.subjects, place.device
    with compared_routers(job, expert, base, device) as routers:
        keep_routing(snapshots, routers, device)
        sides = [side_of(place, job, base, expert), side_of(place, job, expert, expert, routers.attached)]
        with joint_pass(
            sides,
            device,
            place.on_step,
            split=base.layout.pieces,
            split_expert=base.layout.split_expert,
            with_stacks=job.options[EXPERT_INPUTS],
            folder=place.folder,
            snapshots=snapshots,
            fewest_tokens=fewest_tokens(job.options),
            by_expert=base.layout.by_expert,
        ) as both:
            yield both, routers


def _measure_expert(place: Place, job: MeasureJob) -> ExpertGrams:
    models = BaseAndExpert(*job.subjects)
    expert, name = models.expert, models.expert.entry.type
    predicted = [len(ids) - 1 for ids in job.text(expert, expert).encoded]
    snapshots = GradientSnapshots(place.snapshot)
    tensors, begun = snapshots.found("measured") or ([], None)
    path = snapshots.growing_file("grams") or place.folder / gram_file(name)
    with _there(place, job, snapshots) as (both, routers):
        with GramFileWriter(path, names_written(models), begun) as file, said_if_not_finite(expert):
            snapshots.grow("grams", file.sync)
            snapshots.keep("measured", lambda: (tensors, file.state()))
            for part in both.parts:
                tensors.extend(write_inputs(file, part.layer, part.inputs, models))
                for parameter, axes in part.axes.items():
                    if (stored := stored_alone(models, parameter)) is not None:
                        file.add_axes(stored, axes)
                for parameter, gram in part.rows.items():
                    file.add_rows(first_stored_name(models.named, parameter), gram)
        routing = routing_rows(name, routers)
        counted = [row for at, own in sorted(both.tokens.items()) for row in token_rows(name, *at, own)]
        snapshots.hand_over("grams", place.folder / gram_file(name))
    rows = [(name, row, *values) for row, values in enumerate(zip(predicted, *both.losses, strict=True))]
    return ExpertGrams(sorted(tensors, key=lambda row: row[1]), rows, routing, counted)


def _file_bytes(job: MeasureJob, expert: Subject) -> int:
    """Most bytes of the matrices of an expert: those of layers that share their inputs are counted for each."""
    decoder, total = expert.decoder, 0
    for layer, block in enumerate(decoder.blocks):
        for component in decoder.components_of(layer):
            if not component.is_stacked:
                width = weight_matrix(block.get_submodule(component.path)).shape[1]
                total += 2 * width * (width + 1)
        total += stack_bytes(decoder, layer)[1] if job.options[EXPERT_INPUTS] else 0
    width = decoder.model.get_input_embeddings().weight.shape[1]
    return total + 4 * width * (width + 1)
