"""The LEWIS norm of every component of every block, taken while text goes through the blocks."""

import contextlib

import torch
from torch import nn

from utils.guidance.lewis.norms import metric_norm, pruned
from utils.models.decoder import Decoder, is_transposed, weight_matrix
from utils.pair.batches import MicroBatch
from utils.passes.second_moments import SecondMoments


class LewisVisitor:
    """Measures the LEWIS norm of every component of every block (a `block_runner.Visitor`).

    `norms` maps (layer, component name) to a float64 scalar tensor on the device, || |W| * sqrt(s) ||_F with s_j the
    sum over real tokens of x_j^2 divided by `divisor`.

    Args:
        decoder: the model.
        tokens: real tokens in all micro-batches; each component must see every one of them once.
        divisor: what the sums of squares are divided by: the token count (ours) or the sample count (the reference).
        sparsity_ratio: share of each row of each linear part that is zeroed by the Wanda metric once a block's norms
            are taken; the pruned block's output feeds the next block.
    """

    def __init__(self, decoder: Decoder, tokens: int, divisor: int, sparsity_ratio: float) -> None:
        self.decoder, self.tokens, self.divisor, self.sparsity_ratio = decoder, tokens, divisor, sparsity_ratio
        paths = [component.path for component in decoder.components]
        self.moments = SecondMoments(decoder.linear_paths if self.rewrites else paths)
        self.norms: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def rewrites(self) -> bool:
        """Pruning replaces weights."""
        return self.sparsity_ratio > 0

    def observing(self, layer: int, block: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Observe the inputs of the block's linear parts."""
        return self.moments.attached(block)

    def begin(self, batch: MicroBatch) -> None:
        """Take note of which tokens are real."""
        self.moments.begin(batch)

    def finish(self, layer: int, block: nn.Module) -> None:
        """Take the block's norms, then prune it if asked."""
        moments = {path: sums / self.divisor for path, sums in self.moments.checked(layer, self.tokens).items()}
        for component in self.decoder.components:
            weight = weight_matrix(block.get_submodule(component.path))
            self.norms[layer, component.name] = metric_norm(weight, moments[component.path])
        if not self.rewrites:
            return
        for path, moment in moments.items():
            module = block.get_submodule(path)
            new = pruned(weight_matrix(module), moment, self.sparsity_ratio)
            module.weight = nn.Parameter(new.t() if is_transposed(module) else new, requires_grad=False)
