"""How sensitive a loss is to each block, and to each parameter outside them: the sum of |parameter * gradient|.

To first order that is how much the loss changes where parameters are set to zero one by one (arXiv 2502.12420).
"""

from collections.abc import Mapping
from typing import Any

import torch

from utils.models.decoder import Decoder


class SensitivityObserver:
    """Sums |parameter * gradient| over the parameters of each block and all samples (a `GradientObserver`).

    `sums` is float64 [blocks], on the device; `outside` the same of each parameter outside the blocks, by name, where its
    gradients are computed. Products are taken in float32, or the parameter's dtype if that is wider.
    """

    _AT_ONCE = 2**22  # products in memory together

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.layers = block_layers(decoder)
        self.sums = torch.zeros(len(decoder.blocks), dtype=torch.float64, device=device)
        self.outside: dict[str, torch.Tensor] = {}

    def wants(self, name: str) -> bool:
        """Every parameter."""
        return True

    def gradient(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, sample: int) -> None:
        """Add one sample's gradient of one parameter."""
        exact = torch.promote_types(parameter.dtype, torch.float32)
        pairs = (value.reshape(-1).split(self._AT_ONCE) for value in (parameter, gradient))
        for value, slope in zip(*pairs, strict=True):
            products = slope.to(exact, copy=True).mul_(value)
            size = torch.linalg.vector_norm(products, ord=1, dtype=torch.float64)
            if name in self.layers:
                self.sums[self.layers[name]] += size
            else:
                self.outside[name] = self.outside.get(name, 0) + size

    def expert_gradient(
        self, name: str, expert: int, matrix: torch.Tensor, gradient: torch.Tensor, sample: int
    ) -> None:
        """Add one sample's gradient of one expert's matrix: its products are a part of the stack's."""
        self.gradient(name, matrix, gradient, sample)

    def state(self) -> Any:
        """The sums so far, as plain data and tensors."""
        return self.sums, self.outside

    def restore(self, state: Any) -> None:
        """Go on from those of `state`."""
        sums, outside = state
        self.sums.copy_(sums)
        self.outside = {name: value.to(self.sums.device) for name, value in outside.items()}

    def finish(self, layer: int | None, parameters: Mapping[str, torch.Tensor]) -> None:
        """Nothing is left to do for a block."""


def layer_of(decoder: Decoder, name: str) -> int | None:
    """The block that a parameter or buffer of the model is in, by its name; None outside the blocks."""
    inside = name.startswith(f"{decoder.blocks_path}.")
    return int(name.removeprefix(f"{decoder.blocks_path}.").partition(".")[0]) if inside else None


def block_layers(decoder: Decoder) -> dict[str, int]:
    """The block of each parameter inside one, by the parameter's name in the model."""
    return {
        f"{decoder.blocks_path}.{layer}.{name}": layer
        for layer, block in enumerate(decoder.blocks)
        for name, _ in block.named_parameters()
    }
