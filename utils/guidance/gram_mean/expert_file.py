"""What a piece of work of gram_mean writes: one expert's file of matrices, and its rows of the tables."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from utils.errors import UserError
from utils.guidance.gram_mean.input_pass import BlockInputs, Side
from utils.guidance.measure_job import MeasureJob
from utils.models.decoder import Component, is_transposed
from utils.models.stored_layout import StoredLayout
from utils.passes.block_gradients import Observing, nothing
from utils.passes.expert_grams import StackGrams
from utils.passes.subjects import StoredPart, Subject, stored_as
from utils.recipes.gram_file import GramFileWriter, NotFiniteError
from utils.workers.piece import Place


@dataclass(frozen=True)
class ExpertGrams:
    """What one expert's pass gave beside its file: rows of the two tables and of those of routers and of experts' tokens."""

    tensors: list[tuple]
    losses: list[tuple]
    routing: list[tuple]
    expert_tokens: list[tuple]


@dataclass(frozen=True)
class BaseAndExpert:
    """The models of one expert's work."""

    base: Subject
    expert: Subject

    @property
    def named(self) -> tuple[Subject, Subject]:
        """Those whose gradients are taken and whose checkpoints name the tensors."""
        return self.base, self.expert


def piece_name(expert: str, number: int) -> str:
    """The name of an expert's piece in the round after `number` others; a type of the pair config holds no +."""
    return f"{expert}+{number}" if number else expert


def side_of(place: Place, job: MeasureJob, subject: Subject, expert: Subject, observing: Observing = nothing) -> Side:
    """A model on the text of an expert, its weights to be brought to the device of a piece."""
    weights = job.open_weights(subject, place.device)
    return Side(subject.decoder, weights, job.text(subject, expert).encoded, observing, subject.label)


@contextlib.contextmanager
def said_if_not_finite(expert: Subject) -> Iterator[None]:
    """Say what it means where the file refuses numbers."""
    try:
        yield
    except NotFiniteError as error:
        raise UserError(
            f"{expert.entry.name}, its inputs or gradients are not finite in {expert.dtype} ({error}); check the "
            "checkpoints, or use --dtype float32 or bfloat16",
            "measure-not-finite",
        ) from error


def stored_alone(models: BaseAndExpert, name: str) -> str | None:
    """The stored tensor that a parameter, or a piece of one, is; None where it is only a part of one, or several."""
    if name in models.base.checkpoint.tensors:
        return name
    layout, own = stored_as(models.named, name)
    stored = layout.stored_names(own)
    return stored[0] if len(stored) == 1 and not layout.is_part(own) else None


def names_written(models: BaseAndExpert) -> set[str]:
    """The names in the checkpoints of everything that may be written."""
    found = set()
    for subject in models.named:
        for name, _ in subject.decoder.model.named_parameters(remove_duplicate=False):
            layout, own = stored_as(models.named, name)
            found.update(layout.stored_names(own))
    return found


def write_inputs(
    file: GramFileWriter, layer: int | None, inputs: BlockInputs, models: BaseAndExpert
) -> Iterator[tuple]:
    """Write a block's Gram matrices of inputs; rows of the table of tensors."""
    base = models.base
    for component, grams in inputs.stacks.items():
        yield from _write_stack(file, layer, component, grams, models)
    for shared in inputs.shared:
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


def _write_stack(
    file: GramFileWriter, layer: int, component: Component, grams: StackGrams, models: BaseAndExpert
) -> Iterator[tuple]:
    """Write each expert's matrix; nothing where it is not stored in matrices of its own whose inputs are the stack's."""
    base, expert_type = models.base, models.expert.entry.type
    name = base.decoder.weight_name(layer, component)
    _, *shape = base.decoder.model.get_parameter(name).shape
    axes = input_axes(base.layout, name, shape, inputs_last=grams.inputs_last)
    if not axes:
        return
    names = {part.tensor: part.name for part in base.parts(layer, component)}
    for number, (gram, tokens) in enumerate(zip(grams.total, grams.tokens.tolist(), strict=True)):
        headers = base.layout.expert_headers(name, number)
        for axis in dict.fromkeys(axes):
            first, *others = (one.name for one, own in zip(headers, axes, strict=True) if own == axis)
            file.add_inputs(first, axis, gram, others)
        for one in headers:
            yield expert_type, layer, names[one.name], one.name, math.prod(one.shape), len(gram), tokens


def input_axes(layout: StoredLayout, parameter: str, shape: Sequence[int], *, inputs_last: bool) -> list[int]:
    """The axis that the inputs run along, of each stored tensor of an expert's matrix in a stack; none if not of all.

    Args:
        layout: of the checkpoint.
        parameter: the stack.
        shape: of one expert's matrix in it.
        inputs_last: whether that is [out, in], else [in, out].
    """
    if parameter not in layout.conversions or not layout.can_take_expert(parameter):
        return []
    channels = torch.arange(shape[1] if inputs_last else shape[0], dtype=torch.float32)
    matrix = (channels if inputs_last else channels[:, None]).expand(*shape)
    pieces = layout.split_expert(parameter, 0, matrix.contiguous())
    found = []
    for header in layout.expert_headers(parameter, 0):
        piece = pieces[header.name]
        axis = next((axis for axis in (1, 0) if _runs_along(piece, axis, channels)), None)
        if axis is None:
            return []
        found.append(axis)
    return found


def _runs_along(piece: torch.Tensor, axis: int, channels: torch.Tensor) -> bool:
    wanted = channels if axis else channels[:, None]
    return piece.dim() == 2 and piece.shape[axis] == len(channels) and bool((piece == wanted).all())
