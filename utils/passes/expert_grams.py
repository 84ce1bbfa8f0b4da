"""Gram matrices of what each expert of a mixture is given: sum over the tokens routed to it of x x', where experts are stacked."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.models.decoder import Component, Decoder
from utils.passes.expert_products import ExpertProducts, ExpertRows
from utils.passes.gram_sums import add_gram, complete


@dataclass
class StackGrams:
    """The inputs of the experts of one stack.

    Attributes:
        total: [experts, in, in], float32 on the block's device; zeros where no token came.
        tokens: [experts], int64 there: how many each expert had.
        inputs_last: whether a matrix is [out, in], else [in, out].
    """

    total: Tensor = field(repr=False)
    tokens: Tensor
    inputs_last: bool


class ExpertInputGrams:
    """Sums x x' over the tokens that each expert of a block is given, in float32. Inputs must hold no pads.

    Experts that run in a way that cannot be watched have none.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._found: dict[Component, StackGrams] = {}

    @contextlib.contextmanager
    def attached(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Start from nothing and watch a block while the context lasts."""
        self._found = {}
        stacks = [one for one in self._decoder.components_of(layer) if one.is_stacked]
        products = ExpertProducts(stacks, self._add)
        with products.attached(block):
            yield
        for one in stacks:
            if one not in self._found and products.idle_experts(one):
                module = block.get_submodule(one.path)
                stack, last = getattr(module, one.parameter), _expects_inputs_last(module)
                width = stack.shape[2 if last else 1]
                self._found[one] = _nothing(len(stack), width, products.device, inputs_last=last)

    def take(self) -> dict[Component, StackGrams]:
        """What was summed up; it is let go of."""
        found, self._found = self._found, {}
        for one in found.values():
            complete(one.total)
        return found

    @torch.no_grad()
    def _add(self, component: Component, stack: Tensor, given: ExpertRows) -> None:
        rows = given.rows
        own = self._found.get(component)
        if own is None:
            last = given.inputs_last
            own = self._found[component] = _nothing(len(stack), rows.shape[-1], rows.device, inputs_last=last)
        if given.expert is None:
            exact = rows.float()
            own.total.baddbmm_(exact.mT, exact)
            own.tokens += (rows != 0).any(dim=2).sum(dim=1)
            return
        rows = rows.reshape(-1, rows.shape[-1])
        add_gram(own.total[given.expert], rows)
        own.tokens[given.expert] += len(rows)


def _expects_inputs_last(module: nn.Module) -> bool:
    """Whether an experts module's matrices are [out, in], as far as transformers says."""
    return not getattr(module, "is_transposed", False)


def _nothing(experts: int, width: int, device: torch.device, *, inputs_last: bool) -> StackGrams:
    total = torch.zeros(experts, width, width, dtype=torch.float32, device=device)
    return StackGrams(total, torch.zeros(experts, dtype=torch.int64, device=device), inputs_last)


def stack_bytes(decoder: Decoder, layer: int) -> tuple[int, int]:
    """Bytes of the Gram matrices of a block's stacks, float32: in memory, and as triangles on disk; about, since which axis the
    inputs run along is known from some architectures only."""
    memory, disk = 0, 0
    for one in decoder.components_of(layer):
        if one.is_stacked:
            module = decoder.blocks[layer].get_submodule(one.path)
            experts, first, last = getattr(module, one.parameter).shape
            width = last if _expects_inputs_last(module) else first
            memory, disk = memory + 4 * experts * width**2, disk + 2 * experts * width * (width + 1)
    return memory, disk


def summed_up(models: Sequence[dict[Component, StackGrams]], texts: Sequence[int]) -> dict[Component, StackGrams]:
    """Added up over models, each divided by the tokens of its text; `tokens` are the least of any. Sums of the first are used up.

    A stack that cannot be watched in one of them is left out.
    """
    found = {}
    for component, first in models[0].items():
        own = [one.get(component) for one in models]
        if None in own:
            continue
        total, tokens = first.total.div_(texts[0]), first.tokens
        for one, text in zip(own[1:], texts[1:], strict=True):
            total.add_(one.total, alpha=1 / text)
            tokens = torch.minimum(tokens, one.tokens)
        found[component] = StackGrams(total, tokens, first.inputs_last)
    return found
