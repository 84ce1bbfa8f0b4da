"""The gradient of a loss by every coefficient of a sum of parts, from one way forward and back, a block at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from utils.guidance.tuned.parts import Parts, SummedWeights

AT_ONCE = 2**20  # entries in float64 together


class CoefficientSlopes:
    """Sums up each parameter's gradient over samples and multiplies it by the parts (a `GradientObserver`).

    dL/da(t, W) = <sum over samples s of w_s dL_s/dW, part_t(W)>, sums in float32, products in float64.

    Args:
        parts: the parts.
        weights: where the parts are read, the source of the model that is gone through.
        by_sample: w_s, filled in before the way back begins.
    """

    def __init__(self, parts: Parts, weights: SummedWeights, by_sample: Sequence[float]) -> None:
        self.weights, self.by_sample = weights, by_sample
        self.names = {name: place for place, name in enumerate(parts.names)}
        self.found = torch.zeros(len(parts.headers), len(self.names), dtype=torch.float64)
        self._sums: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        """Every parameter that the parts have."""
        return name in self.names

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor, sample: int) -> None:
        """Add one sample's gradient of one parameter."""
        if name in self._sums:
            self._sums[name].add_(gradient, alpha=self.by_sample[sample])
        else:
            self._sums[name] = gradient.float().mul_(self.by_sample[sample])

    def expert_gradient(self, name: str, expert: int, matrix: Tensor, gradient: Tensor, sample: int) -> None:
        """Multiply one sample's gradient of one expert's matrix by its parts."""
        total = gradient.float().mul_(self.by_sample[sample])
        for row, type_ in enumerate(self.weights.parts):
            self.found[row, self.names[name]] += _product(total, self.weights.part_of_expert(type_, name, expert))

    def finish(self, layer: int | None, parameters: Mapping[str, Tensor]) -> None:
        """Multiply a block's gradients by its parts."""
        while self._sums:
            name, total = self._sums.popitem()
            for row, type_ in enumerate(self.weights.parts):
                self.found[row, self.names[name]] = _product(total, self.weights.part(type_, name))


def _product(slope: Tensor, part: Tensor) -> float:
    """The sum of the products of entries, in float64, a few at a time; here, so that a part is let go of before the next."""
    pairs = zip(slope.flatten().split(AT_ONCE), part.flatten().split(AT_ONCE), strict=True)
    return float(torch.stack([one.double() @ other.double() for one, other in pairs]).sum())


def group_numbers(names: Sequence[str], stored: Sequence[Sequence[str]], level: str, blocks_path: str) -> list[int]:
    """Which parameters share a coefficient, as numbers from 0, in the order of the names.

    Args:
        names: of parameters, in the model.
        stored: for each the tensors of the checkpoint that it is made of; those of the same ones share a coefficient always.
        level: `tensor`: none; `part`: those of a block's attention, of its MLP, each norm; `block`: those of a block;
            `expert`: all. What lies outside the blocks has coefficients of its own, but for `expert`.
        blocks_path: where the blocks are in the model.
    """
    keys = []
    for name, tensors in zip(names, map(tuple, stored), strict=True):
        rest = name.removeprefix(f"{blocks_path}.")
        layer, _, within = rest.partition(".")
        inside = rest != name and layer.isdigit()
        key = {"tensor": tensors, "part": (layer, within.split(".")[0]), "block": layer, "expert": ""}[level]
        keys.append(key if inside or level == "expert" else tensors)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]
