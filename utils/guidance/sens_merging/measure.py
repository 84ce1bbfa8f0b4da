"""Sens-Merging, measure half: sensitivities of each expert on its own text, distances between the experts' logits."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from utils.errors import UserError
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.own_text import Answer, accepted_doubts, forward_losses, gains_on_own_text
from utils.guidance.routing import compared_routers, keep_routing, routing_rows
from utils.guidance.sens_merging.distances import logits_bytes, mean_distance, real_tokens, tokens_at_once
from utils.guidance.sens_merging.sensitivities import SensitivityObserver, block_layers, layer_of
from utils.guidance.sens_merging.tables import (
    DISTANCE_TABLE,
    LOSS_TABLE,
    OUTSIDE_TABLE,
    SENSITIVITY_TABLE,
    TENSOR_TABLE,
)
from utils.models.weight_source import tied_names
from utils.pair.source import CalibrationSource
from utils.passes.block_gradients import backward_pass, observe_gradients
from utils.passes.block_runner import Bystander, run_blocks
from utils.passes.gradient_memory import GradientMemory, gradient_memory
from utils.passes.gradient_refusals import refuse_short
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.language_head import fetch_head, language_head, require_head
from utils.passes.snapshots import Snapshots
from utils.passes.subjects import Subject, component_names, snapshot_bytes
from utils.workers.piece import Piece, Place
from utils.workers.results import KeptResult

_DISTANCES = "+distances"  # a piece's name, which no expert can have


@dataclass(frozen=True)
class _Expert:
    """What one expert's passes gave: sensitivities [blocks] and of each parameter outside them, the samples' losses, final
    hidden states [tokens, hidden] of each text, rows of the table of routers."""

    sensitivities: list[float]
    outside: Mapping[str, float]
    losses: tuple[float, ...]
    finals: Mapping[CalibrationSource, torch.Tensor]
    routing: list[tuple]


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    return ["gradients: sample by sample, block by block, then of what lies outside the blocks"]


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak of an expert's passes, about; on a CPU with two more gradients of an embedding, which its
    allocator takes (measured), in float32. Or of two models' logits while they are compared."""
    largest = max(value.numel() for value in job.base.decoder.model.parameters())
    is_cpu = not job.devices or job.devices[0].type == "cpu"
    passes = max(_needed(job, expert).peak() for expert in job.experts) + is_cpu * 2 * 4 * largest
    return max(passes, _compared(job, len(job.experts) if is_cpu else 2))


def _compared(job: MeasureJob, heads: int) -> int:
    """Bytes of so many heads, and of a piece of two models' logits and their distances."""
    rows, hidden = job.base.decoder.model.get_input_embeddings().weight.shape
    tokens = max(text.tokens for text in job.base.texts.values())
    size, entries = job.base.dtype.itemsize, rows * min(tokens, tokens_at_once(rows))
    return heads * size * rows * hidden + entries * logits_bytes(size)


def waiting(job: MeasureJob) -> int:
    """Bytes that wait for the way back of the experts that are measured at a time, at most."""
    return job.experts_at_a_time * max(_needed(job, expert).waiting for expert in job.experts)


def on_disk(job: MeasureJob) -> int:
    """Bytes of the files with names in which hidden states wait, and of the snapshots beside them."""
    snapshot = max(snapshot_bytes(subject) for subject in job.subjects)
    return waiting(job) + job.experts_at_a_time * snapshot


def _needed(job: MeasureJob, expert: Subject) -> GradientMemory:
    return gradient_memory(expert, job.text(expert, expert).encoded)


def measure(job: MeasureJob) -> Measured:
    """Sensitivities of each expert on its own text, distances between experts on each other's."""
    for expert in job.experts:
        _refuse_what_cannot_be_compared(job, expert)
    tensors = _tensor_rows(job.base)
    names, types = [expert.entry.type for expert in job.experts], (_Expert, CalibrationSource)
    pieces = [
        Piece(name, _passes, (job.of(job.base, expert),), 3 * len(expert.decoder.blocks), name, types)
        for name, expert in zip(names, job.experts, strict=True)
    ]
    left = sum(_needed(job, expert).waiting for expert in job.experts)
    on_text = gains_on_own_text(job, job.experts, _ask, left=left, least=on_disk(job))
    experts: dict[str, _Expert] = dict(zip(names, job.run(pieces), strict=True))
    kept = {name: KeptResult(job.workspace, name, types) for name in names}
    own = job.of(job.base, *job.experts)
    ((distances, warnings),) = job.run(
        [Piece(_DISTANCES, _distances, (own, kept), len(names) * (len(names) - 1), _DISTANCES)]
    )
    rows = [(name, layer, value) for name, one in experts.items() for layer, value in enumerate(one.sensitivities)]
    outside = [row for expert in job.experts for row in _outside_rows(job.base, expert, experts[expert.entry.type])]
    losses = [(name, len(one.losses), sum(one.losses) / len(one.losses)) for name, one in experts.items()]
    forms = {SENSITIVITY_TABLE: rows, DISTANCE_TABLE: distances, TENSOR_TABLE: tensors, LOSS_TABLE: losses}
    forms |= {OUTSIDE_TABLE: outside}
    return Measured(
        files={form.file: form.content(rows) for form, rows in forms.items()},
        notes=tuple(
            [
                f"{name}: loss {loss:.4f} nats per token on its own text ({count} samples)"
                for name, count, loss in losses
            ]
            + [f"{row[0]} against {row[1]}: logits {row[2]:.4g} apart on the text of {row[1]}" for row in distances]
        ),
        warnings=(*on_text.not_asked, *accepted_doubts(on_text.gains), *warnings),
        routing=tuple(row for one in experts.values() for row in one.routing),
    )


def _refuse_what_cannot_be_compared(job: MeasureJob, expert: Subject) -> None:
    """Refuse, before weights are read, an expert without a head or with other tokens than the rest."""
    require_head(expert.decoder, expert.layout, f"model {expert.entry.name}")
    first = job.experts[0]
    for other in job.experts:
        if job.text(expert, other).encoded != job.text(first, other).encoded:
            raise UserError(
                f"--guidance sens_merging compares the experts' logits token by token, but {expert.entry.name} and "
                f"{first.entry.name} split the text of {other.entry.type} into different tokens; use experts with the "
                "same tokenizer, or another --guidance",
                "tokenizer-differs",
            )


def _tensor_rows(base: Subject) -> list[tuple[str, int, str, int]]:
    """(name in the checkpoint, layer, component, parameters) of every parameter that is stored; -1 before the blocks, the
    number of blocks behind them (in the order in which the model declares its parts)."""
    decoder = base.decoder
    layers, blocks = block_layers(decoder), len(decoder.blocks)
    components = component_names(base)
    rows, absent, outside = [], [], -1
    stored_buffers = [name for name, _ in decoder.model.named_buffers() if name in base.layout]
    for name in [*(name for name, _ in decoder.model.named_parameters()), *stored_buffers]:
        layer = layers.get(name, layer_of(decoder, name))
        if layer is not None:
            outside = blocks
        if name in base.layout:
            layer = outside if layer is None else layer
            rows += [
                (header.name, layer, components.get(header.name, ""), math.prod(header.shape))
                for header in base.layout.headers(name)
            ]
        elif name not in tied_names(decoder.model):
            absent.append(name)
    if absent:
        raise UserError(
            f"model {base.entry.name}: its checkpoint has no {', '.join(absent[:4])}, which a recipe could then not "
            "weigh; save the whole model, with its head",
            "model-no-head",
        )
    return list({row[0]: row for row in reversed(rows)}.values())[::-1]  # what holds several parameters comes once


def _outside_rows(base: Subject, expert: Subject, found: _Expert) -> Iterator[tuple[str, str, str, float]]:
    """(expert, name in the base's checkpoint, the one it is tied to, sensitivity) of each parameter outside the blocks.

    A tied parameter has the other one's sensitivity, and names it: the two are one layer.
    """
    tied = tied_names(expert.decoder.model)
    sums: dict[str, float] = {}
    for name, value in found.outside.items():
        for stored in base.layout.stored_names(name):
            sums[stored] = sums.get(stored, 0.0) + value  # one that holds several parameters has the sum of theirs
    for stored, value in sums.items():
        yield expert.entry.type, stored, "", value
    for name, other in tied.items():
        if name in base.layout and name not in found.outside and other in found.outside:
            yield expert.entry.type, base.stored_name(name), base.stored_name(other), found.outside[other]


def _ask(place: Place, job: MeasureJob) -> Answer:
    """The base's way forward on an expert's text, and the way there of `_passes`."""
    base, expert = job.subjects
    observer, snapshots = SensitivityObserver(expert.decoder, place.device), GradientSnapshots(place.snapshot)
    refuse_short(job.text(base, expert).encoded)
    before = snapshots.found("base") or forward_losses(place, job, base, expert)
    snapshots.keep("base", lambda: before)
    weights, samples = job.open_weights(expert, place.device), job.text(expert, expert).encoded
    places = {"on_block": place.on_step, "folder": place.folder, "snapshots": snapshots, "label": expert.label}
    with backward_pass(expert.decoder, weights, samples, observer, place.device, outside=True, **places) as model:
        snapshots.write()
        return Answer(before, model.losses)


def _passes(place: Place, job: MeasureJob) -> _Expert:
    """An expert's way there and back on its text, then forward on every text."""
    (base, expert), device, on_block = job.subjects, place.device, place.on_step
    decoder, own = expert.decoder, job.text(expert, expert)
    observer, snapshots = SensitivityObserver(decoder, device), GradientSnapshots(place.snapshot)
    if (found := snapshots.found("sums")) is not None:
        observer.restore(found)
    snapshots.keep("sums", observer.state)
    places = {"on_block": on_block, "folder": place.folder, "snapshots": snapshots}
    weights = job.open_weights(expert, device)
    with compared_routers(job, expert, base, device) as routers:
        keep_routing(snapshots, routers, device)
        places["observing"] = routers.attached
        losses = observe_gradients(decoder, weights, own.encoded, observer, device, outside=True, **places)
        routing = routing_rows(expert.entry.type, routers)
    outside = {name: float(total) / len(own.encoded) for name, total in observer.outside.items()}
    values = [value / len(own.encoded) for value in observer.sums.tolist()]
    named = {**{f"block {layer}": value for layer, value in enumerate(values)}, **outside}
    for what, value in named.items():
        if not value < float("inf"):
            raise UserError(
                f"model {expert.entry.name}: the sensitivity of {what} is {value}: gradients are not finite in "
                f"{expert.dtype}; use --dtype float32 or bfloat16",
                "measured-not-finite",
            )
    batches = [batch for text in expert.texts.values() for batch in text.batches]
    weights = job.open_weights(expert, device)
    kept = Snapshots(place.snapshot and place.snapshot.with_suffix(".forward"))
    found = iter(run_blocks(decoder, weights, batches, Bystander(), device, on_block=on_block, snapshots=kept))
    snapshots.forget()
    finals = {
        source: real_tokens([next(found) for _ in text.batches], text.batches) for source, text in expert.texts.items()
    }
    return _Expert(values, outside, losses, finals, routing)


def _distances(
    place: Place, job: MeasureJob, kept: Mapping[str, KeptResult]
) -> tuple[list[tuple[str, str, float, int]], list[str]]:
    """Rows (model, other, distance on the other's text, tokens), and warnings; the heads are in memory meanwhile."""
    rows, warnings, device = [], [], place.device
    found: dict[str, _Expert] = {name: one.read() for name, one in kept.items()}
    heads = {one.entry.type: fetch_head(one.decoder, job.open_weights(one, torch.device("cpu"))) for one in job.experts}
    for expert in job.experts:
        for other in job.experts:
            if other is expert:
                continue
            ours, theirs = found[expert.entry.type], found[other.entry.type]
            text = job.config.text_of(other.entry.type)
            sizes = [one.decoder.model.get_input_embeddings().weight.shape[0] for one in (expert, other)]
            with (
                language_head(expert.decoder, heads[expert.entry.type], device) as our_logits,
                language_head(other.decoder, heads[other.entry.type], device) as their_logits,
            ):
                finals, at_once = (ours.finals[text], theirs.finals[text]), tokens_at_once(max(sizes))
                mean, sizes = mean_distance(*finals, our_logits, their_logits, device, at_once)
            distance = float(mean)
            names = f"{expert.entry.name} and {other.entry.name}"
            if not distance < float("inf"):
                raise UserError(
                    f"the distance between the logits of {names} is {distance}; use --dtype float32",
                    "measured-not-finite",
                )
            if sizes[0] != sizes[1]:
                warnings.append(f"{names} have {sizes[0]} and {sizes[1]} logits; the first {min(sizes)} were compared")
            rows.append((expert.entry.type, other.entry.type, distance, len(finals[0])))
            place.on_step(len(rows))
    return rows, warnings
