"""What a piece of work of gram_mean writes: one expert's file of matrices, and its rows of the tables."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from utils.errors import UserError
from utils.guidance.gram_mean.input_pass import SharedInputs, Side
from utils.guidance.measure_job import MeasureJob
from utils.models.decoder import Component, is_transposed
from utils.passes.block_gradients import Observing, nothing
from utils.passes.subjects import StoredPart, Subject, stored_as
from utils.recipes.gram_file import GramFileWriter
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
    return Side(subject.decoder, weights, job.text(subject, expert).encoded, observing)


@contextlib.contextmanager
def said_if_not_finite(expert: Subject) -> Iterator[None]:
    """Say what it means where the file refuses numbers."""
    try:
        yield
    except ValueError as error:
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
    file: GramFileWriter, layer: int | None, inputs: Sequence[SharedInputs], models: BaseAndExpert
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
