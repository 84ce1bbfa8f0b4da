"""What one expert's pass gives for the saliency budget: rows of its tables, and vectors for every parameter."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.guidance.expert_tokens import token_rows
from utils.guidance.few_tokens import fewest_tokens
from utils.guidance.measure_job import MeasureJob
from utils.guidance.own_text import Answer, expert_forward, forward_losses
from utils.guidance.routing import compared_routers, keep_routing, routing_rows
from utils.guidance.saliency_budget.histograms import SaliencyHistogram, saliency_histogram
from utils.guidance.saliency_budget.method import POINTS
from utils.guidance.saliency_budget.squared_gradients import (
    ComponentSquares,
    Side,
    SquaresPass,
    Storing,
    squares_pass,
)
from utils.guidance.saliency_budget.tables import TENSOR_TABLE
from utils.passes.axis_sums import explained_share, row_column_factors
from utils.passes.block_gradients import Observing, nothing
from utils.passes.gradient_refusals import refuse_short
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.routing import RouterComparison
from utils.passes.subjects import Subject, component_names, stored_as
from utils.passes.tensor_store import Stored
from utils.workers.piece import Place


@dataclass(frozen=True)
class ExpertMeasurement:
    """Rows of the table of tensors, vectors by tensor (`utils/recipes/saliency_vectors.py`), losses at base and expert, rows
    of the tables of routers, if gradients were taken at the expert, and of experts' tokens.

    `bins` are by tensor the numbers of the bins that are not empty (int32) and their counts (int64): hundreds a tensor, of
    which a row of Python numbers each would take as much memory as the weights.
    """

    tensors: list[tuple]
    bins: dict[str, tuple[Tensor, Tensor]]
    vectors: Mapping[str, tuple[Tensor, ...]]
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    routing: list[tuple]
    expert_tokens: list[tuple]


def ask(place: Place, job: MeasureJob) -> Answer:
    """The losses of base and expert on the expert's text, from the way there of `measure_saliency`, and from a way forward
    alone of a model whose gradients are not taken."""
    (base, expert), (at_base, at_expert) = job.subjects, POINTS[job.options["gradient_at"]]
    snapshots = GradientSnapshots(place.snapshot)
    refuse_short(job.text(base, expert).encoded)
    alone: Any = snapshots.found("alone")
    if alone is None:
        alone = (
            () if at_base else forward_losses(place, job, base, expert),
            *(((), ()) if at_expert else expert_forward(place, job)),
        )
    snapshots.keep("alone", lambda: alone)
    with _there(place, job, snapshots) as (both, _):
        snapshots.write()
        own_base, own_expert, routing = alone
        return Answer(both.losses[0] or own_base, both.losses[1] or own_expert, routing)


@contextmanager
def _there(
    place: Place, job: MeasureJob, snapshots: GradientSnapshots
) -> Iterator[tuple[SquaresPass, RouterComparison]]:
    """Base and expert at the end of the way there, with what compares their routers on the way back."""
    (base, expert), (at_base, at_expert) = job.subjects, POINTS[job.options["gradient_at"]]

    def side(subject: Subject, is_wanted: bool, observing: Observing = nothing) -> Side:
        samples = job.text(subject, expert).encoded if is_wanted else None
        return Side(subject.decoder, job.open_weights(subject, place.device), samples, observing, subject.label)

    with compared_routers(job, expert, base, place.device) as routers:
        keep_routing(snapshots, routers, place.device)
        sides, layout = (side(base, at_base), side(expert, at_expert, routers.attached)), base.layout
        more = {"storing": Storing(layout.split, layout.split_expert, layout.pieces, layout.by_expert)}
        more |= {"folder": place.folder, "snapshots": snapshots, "fewest_tokens": fewest_tokens(job.options)}
        with squares_pass(*sides, place.device, place.on_step, **more) as both:
            yield both, routers


def measure_saliency(place: Place, job: MeasureJob) -> ExpertMeasurement:
    """Take base and expert back through their blocks on the expert's text.

    Args:
        place: where to compute; its `on_step` is called twice per block and model with gradients.
        job: of base and expert alone, for texts, weights, where gradients are taken (`gradient_at`; F is the sum), and the
            exponent `saliency_power` of F in the saliencies that are counted. Vectors are of F itself.

    Raises:
        UserError: weights or gradients that are not finite; as `squares_pass`.
    """
    base, expert = job.subjects
    name, power = expert.entry.type, job.options["saliency_power"]
    names = component_names(base)
    snapshots = GradientSnapshots(place.snapshot)
    tensors, plain = snapshots.found("measured") or ([], {})
    waiting = {tensor: [Stored(*one) for one in stored] for tensor, stored in plain.items()}
    snapshots.keep(
        "measured", lambda: (tensors, {name: [one.plain() for one in stored] for name, stored in waiting.items()})
    )
    with (
        snapshots.store(
            "tensors", torch.device("cpu"), place.folder
        ) as store,  # small ones pin the memory of large ones
    ):
        with _there(place, job, snapshots) as (both, routers):
            for part in both.parts:
                try:
                    histogram = saliency_histogram(part.base, part.expert, part.squares, power)
                except ValueError as error:
                    raise _not_finite(part.tensor, base, expert) from error
                matrix = part.squares.flatten(end_dim=-2)  # stacked experts: the rows of all
                axes = row_column_factors(matrix)
                tensors.append(_tensor_row(name, names[part.tensor], part, histogram, explained_share(matrix, *axes)))
                full = histogram.counts.nonzero().flatten()
                waiting[part.tensor] = [store.put(one) for one in (*axes, full.int(), histogram.counts[full])]
            vectors = _other_vectors(both.others, base, expert)
            losses = both.losses
            tokens = [row for place, own in sorted(both.tokens.items()) for row in token_rows(name, *place, own)]
        snapshots.forget()
        found = {tensor: [store.take(one) for one in stored] for tensor, stored in waiting.items()}
    vectors |= _buffer_vectors(base)
    vectors |= {tensor: (rows, columns) for tensor, (rows, columns, _, _) in found.items()}
    bins = {tensor: tuple(found[tensor][2:]) for tensor in names if tensor in found}
    return ExpertMeasurement(_in_order(tensors, names), bins, vectors, losses, routing_rows(name, routers), tokens)


def _other_vectors(
    others: Mapping[str, tuple[Tensor, ...]], base: Subject, expert: Subject
) -> dict[str, tuple[Tensor, ...]]:
    """Vectors of parameters that are not measured, or of pieces of them, by the names they are stored under. Of a tensor that
    several parameters are made of (a vision tower's q, k and v) all entries count alike."""
    vectors = {}
    for parameter, axes in others.items():
        if parameter in base.checkpoint.tensors:
            tensor, is_whole = parameter, True
        else:
            layout, own = stored_as((base, expert), parameter)
            tensor, *pieces = layout.stored_names(own)
            is_whole = not pieces and not layout.is_part(own)
        if not all(bool(axis.isfinite().all()) for axis in axes):
            raise _not_finite(tensor, base, expert)
        if is_whole:
            vectors[tensor] = axes
        elif layout.is_part(own):
            vectors |= {header.name: _alike(header.shape) for header in layout.headers(own) if len(header.shape) <= 2}
    return vectors


def _alike(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Vectors by which all entries of a tensor count alike."""
    return tuple(torch.ones(length, dtype=torch.float64) for length in shape or (1,))


def _buffer_vectors(base: Subject) -> dict[str, tuple[Tensor, ...]]:
    """Vectors of what a checkpoint has beside parameters (scales of a block, say), by stored name: without gradients all
    entries count alike."""
    found = {}
    for name, value in base.decoder.model.named_buffers():
        if name in base.layout and value.is_floating_point() and value.dim() <= 2:
            found[base.layout.stored_names(name)[0]] = _alike(tuple(value.shape))
    return found


def _not_finite(tensor: str, base: Subject, expert: Subject) -> UserError:
    return UserError(
        f"{tensor}: the weights of {base.entry.name} or {expert.entry.name}, or their gradients, are not finite in "
        f"{expert.dtype}; check the checkpoints, or use --dtype float32 or bfloat16",
        "measured-not-finite",
    )


def _tensor_row(
    model: str, component: str, part: ComponentSquares, histogram: SaliencyHistogram, explained: float
) -> tuple:
    place = (model, part.layer, component, part.tensor, part.base.numel())
    return (*place, histogram.changed, histogram.zeros, histogram.norm, explained)


def _in_order(rows: list[tuple], tensors: Iterable[str]) -> list[tuple]:
    """Rows in the order of these tensors; they were measured from the last layer to the first."""
    places = {tensor: place for place, tensor in enumerate(tensors)}
    return sorted(rows, key=lambda row: places[row[TENSOR_TABLE.names.index("tensor")]])
