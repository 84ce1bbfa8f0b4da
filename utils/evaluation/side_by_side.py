"""Several models of the same rows, a decoder block at a time: each block of each model is in memory once, in turn.

What all models are made of is read once: while the models' blocks of one layer are made, one after the other, the
inputs' blocks stay in the system's page cache. So a pass needs memory for one block (a few where they are small), for
the hidden states of all rows of all models, and for little else, however large the models are.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from utils.errors import UserError
from utils.evaluation.encoding import ScoredBatch
from utils.evaluation.pass_memory import tensor_bytes
from utils.evaluation.row_losses import row_losses
from utils.models.decoder import Decoder
from utils.models.weight_source import placed, tensor_names
from utils.passes.block_runner import block_tensor_names, body_names
from utils.passes.flows import Flow, stops
from utils.passes.language_head import head_names, language_head

NOT_FINITE = "merge-not-finite"  # the code of a merged tensor that holds NaN or infinity


class WeightsOfMany(Protocol):
    """Where the tensors of several models come from, by the names that the models have for them."""

    def fetch(self, models: Sequence[int], names: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor] | UserError]:
        """The named tensors of each of some models (by number); in place of them the error, where they have none."""

    def models_at_once(self, nbytes: int) -> int:
        """How many models' tensors to ask for at a time, where those of one take so many bytes."""

    def close(self) -> None:
        """Let go of open files."""


@dataclass
class Seconds:
    """Where the time of a pass went: weights that were read and merged, and the models' own forward with its losses."""

    weights: float = 0.0
    forward: float = 0.0


@dataclass
class Entry:
    """One model on its way: the skeleton (shared by models of one shape), its batches, and how far they are.

    `failure` says why a model has no losses.
    """

    decoder: Decoder
    batches: Sequence[ScoredBatch]
    flows: list[Flow] = field(default_factory=list)
    outside: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    failure: UserError | None = None

    @property
    def layers(self) -> int:
        return len(self.decoder.blocks)

    def fail(self, error: UserError) -> None:
        """Give up this model, and let go of what it holds."""
        self.failure = error
        self.let_go()

    def let_go(self) -> None:
        for flow in self.flows:
            flow.close()
        self.flows, self.outside = [], {}


@torch.inference_mode()
def run_side_by_side(
    entries: Sequence[Entry],
    weights: WeightsOfMany,
    device: torch.device,
    on_block: Callable[[int], None] = lambda layer: None,
) -> Seconds:
    """Take every model's batches through all its blocks and its head; fills in `losses`, one list for each batch.

    Args:
        entries: the models; their skeletons' parameters are on the meta device before and after.
        weights: where their tensors come from, by their numbers in `entries`.
        device: where to compute.
        on_block: called with the layer number after all models went through that block.

    Returns:
        Where the time went.
    """
    seconds = Seconds()
    with contextlib.ExitStack() as stack:
        stack.callback(weights.close)
        stack.callback(lambda: [entry.let_go() for entry in entries])
        for decoder in {id(entry.decoder): entry.decoder for entry in entries}.values():
            stack.enter_context(stops(decoder.blocks))
        _each(entries, weights, seconds, _outside_names, lambda entry, tensors: _start(entry, tensors, device))
        for layer in range(max(entry.layers for entry in entries)):
            _each(
                [entry if layer < entry.layers else None for entry in entries],
                weights,
                seconds,
                lambda entry, layer=layer: tensor_names(entry.decoder.blocks[layer], _block_path(entry, layer)),
                lambda entry, tensors, layer=layer: _through(entry, layer, tensors, device),
            )
            on_block(layer)
        _each(entries, weights, seconds, _head_names, lambda entry, tensors: _score(entry, tensors, device))
    return seconds


def _each(
    entries: Sequence[Entry | None],
    weights: WeightsOfMany,
    seconds: Seconds,
    names_of: Callable[[Entry], list[str]],
    work: Callable[[Entry, dict[str, torch.Tensor]], None],
) -> None:
    """Fetch some tensors of each model that is still there, a few models at a time, and do its work with them."""
    there = [number for number, entry in enumerate(entries) if entry is not None and entry.failure is None]
    while there:
        at_once = weights.models_at_once(tensor_bytes(entries[there[0]].decoder.model, names_of(entries[there[0]])))
        now, there = there[:at_once], there[at_once:]
        start = time.perf_counter()
        fetched = weights.fetch(now, [names_of(entries[number]) for number in now])
        made = time.perf_counter()
        seconds.weights += made - start
        for place, number in enumerate(now):
            found, fetched[place] = fetched[place], None
            if isinstance(found, UserError):
                entries[number].fail(found)
            else:
                work(entries[number], found)
            del found
        seconds.forward += time.perf_counter() - made


def _head_names(entry: Entry) -> list[str]:
    return head_names(entry.decoder)


def _outside_names(entry: Entry) -> list[str]:
    inside = block_tensor_names(entry.decoder)
    return [name for name in body_names(entry.decoder) if name not in inside]


def _block_path(entry: Entry, layer: int) -> str:
    return f"{entry.decoder.blocks_path}.{layer}"


def _start(entry: Entry, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Begin every batch; of what lies outside the blocks, all but the embeddings is kept."""
    model = entry.decoder.model
    with placed(model, "", tensors, device):
        entry.flows = [Flow(entry.decoder.body, scored.batch, device) for scored in entry.batches]
        for flow in entry.flows:
            flow.advance()
    embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    entry.outside = {name: tensor for name, tensor in tensors.items() if name not in embeddings}


def _through(entry: Entry, layer: int, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    block = entry.decoder.blocks[layer]
    with placed(block, _block_path(entry, layer), tensors, device), _outside(entry, device):
        for flow in entry.flows:
            flow.expect(layer)
            flow.advance()


@contextlib.contextmanager
def _outside(entry: Entry, device: torch.device) -> Iterator[None]:
    """Put what a model has outside its blocks, the embeddings left out, into the skeleton."""
    with contextlib.ExitStack() as stack:
        for path in {name.rpartition(".")[0] for name in entry.outside}:
            stack.enter_context(placed(entry.decoder.model.get_submodule(path), path, entry.outside, device))
        yield


def _score(entry: Entry, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    model = entry.decoder.model
    width = model.get_input_embeddings().weight.shape[0]
    entry.losses = []
    finals = [flow.result() for flow in entry.flows]
    entry.let_go()
    with language_head(entry.decoder, tensors, device) as to_logits:
        for place, scored in enumerate(entry.batches):
            entry.losses.append(row_losses(finals[place], scored, to_logits, width))
            finals[place] = None
