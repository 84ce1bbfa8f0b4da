"""The LEWIS norm of every component of every block, taken while text goes through the blocks."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils.guidance.lewis.norms import metric_norm, pruned
from utils.models.decoder import Component, Decoder, is_transposed, weight_matrix
from utils.models.stored_layout import StoredLayout
from utils.pair.batches import MicroBatch
from utils.passes.expert_inputs import ExpertInputs, StackSums
from utils.passes.second_moments import SecondMoments


@dataclass(frozen=True)
class StackNorms:
    """The norms of a component that is stored in several tensors, by their names; of experts also each one's tokens."""

    norms: dict[str, torch.Tensor]
    tokens: torch.Tensor | None

    def on_cpu(self) -> "StackNorms":
        """The same on the CPU."""
        tokens = None if self.tokens is None else self.tokens.cpu()
        return StackNorms({name: norm.cpu() for name, norm in self.norms.items()}, tokens)


class LewisVisitor:
    """Measures the LEWIS norm of every component of every block (a `block_runner.Visitor`).

    `norms` maps (layer, component name) to a float64 scalar tensor on the device, || |W| * sqrt(s) ||_F with s_j the
    sum over real tokens of x_j^2 divided by `divisor`. `stacks` maps it, for experts, to the norm of each stored tensor
    (one expert's matrix, or all of them where the checkpoint stores them as one), of the tokens routed to it.

    Args:
        decoder: the model.
        tokens: real tokens in all micro-batches; each component must see every one of them once.
        divisor: what the sums of squares are divided by: the token count (ours) or the sample count (the reference).
        sparsity_ratio: share of each row of each linear part that is zeroed by the Wanda metric once a block's norms
            are taken; the pruned block's output feeds the next block.
        layout: how the checkpoint stores experts; needed where there are any.
        passing_over: pass over linear parts whose weights the model does not use by calling them as modules.
        fewest_tokens: an expert with fewer tokens is taken towards its layer's mean (`StackSums.metric`).
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens: int,
        divisor: int,
        sparsity_ratio: float,
        layout: StoredLayout | None = None,
        *,
        passing_over: bool = False,
        fewest_tokens: int = 0,
    ) -> None:
        self.decoder, self.tokens, self.divisor, self.sparsity_ratio = decoder, tokens, divisor, sparsity_ratio
        self.layout, self.passing_over, self.fewest_tokens = layout, passing_over, fewest_tokens
        self.norms: dict[tuple[int, str], torch.Tensor] = {}
        self.stacks: dict[tuple[int, str], StackNorms] = {}
        self.moments, self.experts = SecondMoments(()), ExpertInputs(())

    @property
    def rewrites(self) -> bool:
        """Pruning replaces weights."""
        return self.sparsity_ratio > 0

    @contextlib.contextmanager
    def observing(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Observe the inputs of the block's linear parts and experts."""
        linear = [one.path for one in self.decoder.components_of(layer) if not one.is_stacked]
        self.moments = SecondMoments(self.decoder.linear_paths[layer] if self.rewrites else linear)
        self.experts = ExpertInputs([one for one in self.decoder.components_of(layer) if one.is_stacked])
        with self.moments.attached(block), self.experts.attached(block):
            yield

    def begin(self, batch: MicroBatch) -> None:
        """Take note of which tokens are real."""
        self.moments.begin(batch)
        self.experts.begin(batch)

    def state(self) -> dict[str, list[tuple]]:
        """The norms of the blocks that are done."""
        stacks = [(layer, name, one.norms, one.tokens) for (layer, name), one in self.stacks.items()]
        return {"norms": [(layer, name, norm) for (layer, name), norm in self.norms.items()], "stacks": stacks}

    def restore(self, state: dict[str, list[tuple]], device: torch.device) -> None:
        """Take up the norms of an earlier run."""
        self.norms = {(layer, name): norm.to(device) for layer, name, norm in state["norms"]}
        for layer, name, norms, tokens in state["stacks"]:
            there = {stored: norm.to(device) for stored, norm in norms.items()}
            self.stacks[layer, name] = StackNorms(there, None if tokens is None else tokens.to(device))

    def finish(self, layer: int, block: nn.Module) -> None:
        """Take the block's norms, then prune it if asked."""
        checked = self.moments.checked(layer, self.tokens, passing_over=self.passing_over)
        moments = {path: sums / self.divisor for path, sums in checked.items()}
        for component in self.decoder.components_of(layer):
            if component.path in moments:
                self._take_linear(layer, component, block.get_submodule(component.path), moments[component.path])
        self._take_experts(layer, block)
        if not self.rewrites:
            return
        for path, moment in moments.items():
            module = block.get_submodule(path)
            new = pruned(weight_matrix(module), moment, self.sparsity_ratio)
            module.weight = nn.Parameter(new.t() if is_transposed(module) else new, requires_grad=False)

    def _take_linear(self, layer: int, component: Component, module: nn.Module, moments: torch.Tensor) -> None:
        name, key = self.decoder.weight_name(layer, component), (layer, component.name)
        if self.layout is None or len(self.layout.stored_names(name)) < 2:
            self.norms[key] = metric_norm(weight_matrix(module), moments)
            return
        metric = weight_matrix(module).float().square() * moments.float()
        pieces = self.layout.split(name, metric.t() if is_transposed(module) else metric)
        self.stacks[key] = StackNorms({one: part.sum(dtype=torch.float64).sqrt() for one, part in pieces.items()}, None)

    def _take_experts(self, layer: int, block: nn.Module) -> None:
        for component, sums in self.experts.checked(layer).items():
            stack = getattr(block.get_submodule(component.path), component.parameter)
            if stack.device.type == "meta":  # its experts come one at a time
                norms = self._norms_in_parts(layer, component, sums, stack)
            else:
                metric = sums.metric(stack, self.divisor, self.fewest_tokens)
                pieces = self._split(layer, component, metric)
                norms = {name: piece.sum(dtype=torch.float64).sqrt() for name, piece in pieces.items()}
            self.stacks[layer, component.name] = StackNorms(norms, sums.tokens)

    def _norms_in_parts(
        self, layer: int, component: Component, sums: StackSums, stack: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        name, found = self.decoder.weight_name(layer, component), []
        for expert, metric in enumerate(sums.metrics(stack, self.divisor, self.fewest_tokens)):
            pieces = self.layout.split_expert(name, expert, metric)
            found.append([(stored, piece.sum(dtype=torch.float64)) for stored, piece in pieces.items()])
        squares: dict[str, torch.Tensor] = {}
        for stored, total in (one for alike in zip(*found, strict=True) for one in alike):  # in the order of `split`
            squares[stored] = squares[stored] + total if stored in squares else total
        return {stored: total.sqrt() for stored, total in squares.items()}

    def _split(self, layer: int, component: Component, metric: torch.Tensor) -> dict[str, torch.Tensor]:
        name = self.decoder.weight_name(layer, component)
        return {name: metric} if self.layout is None else self.layout.split(name, metric)
