"""A model's own forward on text without weights: in which order it comes to its blocks, and with how many rows.

What lies outside the blocks runs with zeros in the place of its parameters (one number each, whatever their size), and each
block seems to return what it was given. Numbers mean nothing then; the order of calls and the shapes are the model's own.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from utils.errors import UserError, brief
from utils.models.decoder import Decoder
from utils.models.weight_source import placed
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import block_tensor_names
from utils.passes.flows import Arrival, Flow, stops
from utils.passes.shared_state import with_copies

_TOKENS = 5
_CPU = torch.device("cpu")
# What a block may return: its hidden states, alone or with what models hand on beside them.
_RETURNS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda states: states,
    lambda states: (states,),
    lambda states: (states, None),
    lambda states: (states, None, None),
)


@dataclass
class DryWalk:
    """What was seen of `samples` texts of `tokens` tokens.

    `states` is the shape of the hidden states that the first block is given, () if it was not reached; `outputs` are the
    shapes of what modules with parameters outside the blocks return, by path.
    """

    samples: int
    tokens: int
    states: tuple[int, ...] = ()
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def rows_added(self) -> int:
        """How many rows blocks are given for each sample beside one for each token."""
        is_plain = len(self.states) == 3 and self.states[0] == self.samples
        return self.states[1] - self.tokens if is_plain else 0


def dry_walk(
    decoder: Decoder,
    ids: Sequence[int],
    where: str,
    at_block: Callable[[int, Arrival], None] = lambda layer, call: None,
) -> DryWalk:
    """Take a text of some tokens, twice, through a model whose parameters are on the meta device.

    Args:
        decoder: the model.
        ids: token ids; the first few are used.
        where: what to call the model in messages.
        at_block: is given each block's number and the call that the model is about to make to it; more than once, perhaps.

    Returns:
        What was seen; as far as it came, where a model cannot go on with what stands in for its blocks' outputs.

    Raises:
        UserError: text alone does not reach the blocks, does not visit them once each and in order, or is handed on with
            tokens first.
    """
    row = [*ids[:_TOKENS]]
    batch = MicroBatch.of([row] * (2 if len(row) != 2 else 3))
    for part in dict.fromkeys((decoder.model, decoder.body)):
        with _flow(decoder, part, batch) as flow:
            try:
                flow.advance()
            except MemoryError:
                raise
            except Exception as error:  # whatever a model raises that asks for more than text
                raise UserError(
                    f"{where}: its forward on text alone ends before its first block ({brief(error)}); what it needs beside "
                    "text is not measured: merge it with the same coefficients everywhere (utils/merger.py with a recipe "
                    "of your own)",
                    "model-unsupported",
                ) from error
    refusal, seen = None, DryWalk(*batch.input_ids.shape)
    for returned in _RETURNS:
        seen = DryWalk(*batch.input_ids.shape)
        try:
            _walk(decoder, batch, returned, seen, where, at_block)
        except UserError as error:
            refusal = refusal or error
        except MemoryError:
            raise
        except Exception:  # whatever comes of an output of another kind: nothing is known, the pass itself will say
            continue
        else:
            return seen
    if refusal is not None:
        raise refusal
    return seen


def forward_on_zeros(decoder: Decoder, layer: int, call: Arrival, without: Collection[str] = ()) -> None:
    """Run a block on what it is about to be given, with zeros in the place of its parameters, those of some names left out."""
    block, path = decoder.blocks[layer], f"{decoder.blocks_path}.{layer}"
    own = {f"{path}.{name}": value for name, value in block.named_parameters()}
    args, kwargs = with_copies(call.args, call.kwargs)
    with placed(
        block, path, {name: zeros(one.shape, one.dtype) for name, one in own.items() if name not in without}, _CPU
    ):
        call.forward(*args, **kwargs)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One number, whatever the size."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _walk(
    decoder: Decoder,
    batch: MicroBatch,
    returned: Callable[[torch.Tensor], Any],
    seen: DryWalk,
    where: str,
    at_block: Callable[[int, Arrival], None],
) -> None:
    with _watched(decoder, seen), _flow(decoder, decoder.body, batch) as flow:
        flow.advance()
        for layer in range(len(decoder.blocks)):
            call = flow.arrival
            _refuse_other_order(layer, None if call is None else call.layer, where)
            flow.expect(layer)
            states = next(one for one in (*call.args, *call.kwargs.values()) if torch.is_tensor(one))
            seen.states = seen.states or tuple(states.shape)
            at_block(layer, call)
            flow.advance_with(returned(states))
        _refuse_other_order(None, None if flow.arrival is None else flow.arrival.layer, where)
        flow.result()


@contextmanager
def _flow(decoder: Decoder, part: nn.Module, batch: MicroBatch) -> Iterator[Flow]:
    """A pass through a part of the model, with zeros outside the blocks, that has not begun."""
    in_blocks = block_tensor_names(decoder)
    around = {
        name: zeros(value.shape, value.dtype)
        for name, value in decoder.model.named_parameters()
        if name not in in_blocks
    }
    # Not `inference_mode`: a model's own code may keep tensors for later calls, and autograd could not use such ones.
    with torch.no_grad(), placed(decoder.model, "", around, _CPU), stops(decoder.blocks):
        flow = Flow(part, batch, _CPU)
        try:
            yield flow
        finally:
            flow.close()


def _refuse_other_order(due: int | None, at: int | None, where: str) -> None:
    if due == at:
        return
    if at is None or (due is not None and at > due):
        why = f"text alone passes block {due} over (it may be there for images)"
    else:
        why = f"its forward comes to block {at} again"
    raise UserError(
        f"{where}: {why}, and what is measured of a block is of one pass through each, in order; it is not supported: merge "
        "it with the same coefficients everywhere (utils/merger.py with a recipe of your own)",
        "model-unsupported",
    )


@contextmanager
def _watched(decoder: Decoder, seen: DryWalk) -> Iterator[None]:
    def take(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if torch.is_tensor(first):
                seen.outputs.setdefault(path, tuple(first.shape))

        return hook

    inside = f"{decoder.blocks_path}."
    handles = [
        module.register_forward_hook(take(path))
        for path, module in decoder.model.named_modules()
        if module._parameters and not path.startswith(inside)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
