"""From final hidden states to logits, by the model's own head and whatever it does to the logits (caps, scales).

The model's own forward is run with its body replaced by what the body returned before, so that nothing about the head is
assumed; of the weights, only those outside the body are needed.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from utils.errors import UserError
from utils.models.decoder import Decoder, holds_head
from utils.models.weight_source import WeightSource, placed, share_tied, tied_names

ToLogits = Callable[[torch.Tensor], torch.Tensor]
"""Takes final hidden states [..., tokens, hidden], gives logits [..., tokens, vocabulary]."""


@dataclass
class _BodyOutput(ModelOutput):
    """What the body is made to return. Anything but the hidden states that a head asks for is None."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def require_head(decoder: Decoder, stored: Container[str], where: str) -> None:
    """Refuse a checkpoint that has no language-model head; no weights are read.

    Args:
        decoder: the model.
        stored: what the checkpoint holds, by the model's names (`stored_layout`).
        where: what to call the model.

    Raises:
        UserError: a parameter outside the body is not stored, nor tied to one that is.
    """
    if absent := absent_of_head(decoder, stored):
        raise UserError(
            f"{where}: its checkpoint holds no {', '.join(absent)}, so it gives neither logits nor a loss; this guidance "
            "needs the whole causal language model: save it with its head",
            "model-no-head",
        )


def absent_of_head(decoder: Decoder, stored: Container[str]) -> list[str]:
    """The names of a head's parameters that a checkpoint lacks; arguments as for `require_head`."""
    tied = tied_names(decoder.model)
    needed = [name for name, value in _outside_body(decoder).items() if isinstance(value, nn.Parameter)]
    return [name for name in needed if name not in stored and tied.get(name) not in stored]


def fetch_head(decoder: Decoder, weights: WeightSource) -> dict[str, torch.Tensor]:
    """The weights of a model's head by name, among them those that it shares with the body; closes the source."""
    try:
        return weights.fetch(head_names(decoder))
    finally:
        weights.close()


def head_names(decoder: Decoder) -> list[str]:
    """The names of what a model's head needs, those that it shares with the body among them."""
    tied = tied_names(decoder.model)
    own = list(_outside_body(decoder))
    return [*own, *(tied[name] for name in own if name in tied)]


@contextmanager
def language_head(decoder: Decoder, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Iterator[ToLogits]:
    """Place a head's weights into the model and give a function from final hidden states to logits.

    The function computes in the weights' dtype, as the model itself would; call it with gradients off.

    Args:
        decoder: the model, its parameters on the meta device before and after. One thread at a time.
        tensors: what `fetch_head` gave.
        device: where to compute; hidden states must be there.
    """
    with ExitStack() as stack:
        there = {name: tensor.to(device) for name, tensor in tensors.items()}
        stack.enter_context(placed(decoder.model, "", there, device))
        share_tied(decoder.model, there)
        whole = stack.enter_context(behind_body(decoder))
        yield lambda finals: whole(finals[None])[0]


@contextmanager
def behind_body(decoder: Decoder) -> Iterator[ToLogits]:
    """The model's own forward with its body replaced by what it seems to return, with the weights that are in place.

    The function takes final hidden states [samples, length, hidden], gives logits [samples, length, vocabulary].
    """
    model, hidden = decoder.model, None

    def answer(*args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput(last_hidden_state=hidden)

    def to_logits(finals: torch.Tensor) -> torch.Tensor:
        nonlocal hidden
        hidden = finals
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            return model(input_ids=ids, use_cache=False)[0]
        finally:
            hidden = None

    with ExitStack() as stack:
        # Some models call the body, some (OPT) a part of it that holds the blocks: whichever comes first answers.
        for module in _around_blocks(decoder):
            module.forward = answer
            stack.callback(module.__delattr__, "forward")
        yield to_logits


def _outside_body(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the model has beside its body, by name; tied ones too."""
    inside = set(decoder.body.modules())
    found = {}
    for path, module in decoder.model.named_modules():
        if module not in inside:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found |= {f"{path}.{name}" if path else name: value for name, value in own}
    return found


def _around_blocks(decoder: Decoder) -> list[nn.Module]:
    """The modules before the head that hold the list of blocks."""
    parents, model = decoder.blocks_path.split(".")[:-1], decoder.model
    around = [model.get_submodule(".".join(parents[: end + 1])) for end in range(len(parents))]
    return [module for module in around if not holds_head(module, model)]
