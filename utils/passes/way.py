"""How far all samples of a model have come on their way forward and back, and how they get there again after a kill."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from utils.passes.block_calls import mapped
from utils.passes.sample_pass import SamplePass
from utils.passes.tensor_store import Stored


@dataclass
class Way:
    """`forward` blocks have been passed on the way forward, from block `back` on those on the way back."""

    back: int
    forward: int = 0
    passes: list[SamplePass] = field(default_factory=list)

    def state(self) -> dict[str, Any] | None:
        """All of it as plain data and tensors, between two blocks; None where samples hold more than tensors.

        Losses and the gradients of the last block's outputs are not in it: they are computed from its outputs again.
        """
        waiting = [sample.waiting for sample in self.passes]
        if any(one is None for one in waiting):
            return None
        is_back = self.passes and self.back < len(self.passes[0].calls)
        return {
            "forward": self.forward,
            "back": self.back,
            "waiting": [list(one) for one in waiting],
            "gradients": [_gradients(sample) for sample in self.passes] if is_back else None,
        }


def waiting_of(state: dict[str, Any]) -> list[list[Any]]:
    """By sample and block, where outputs wait, of what `Way.state` gave."""
    return [[mapped(output, lambda one: one and Stored(*one[0])) for output in outputs] for outputs in state["waiting"]]


def take_back(way: Way, gradients: Sequence[Any], device: torch.device) -> None:
    """Bring samples, which stand at the end of the way forward, to block `way.back` of the way back."""
    for sample, (by_call, entering) in zip(way.passes, gradients, strict=True):
        for layer, call in enumerate(sample.calls):
            for output in call.outputs():
                output.gradient = None
            if layer < way.back:
                for output, gradient in zip(call.outputs(), by_call[layer], strict=True):
                    output.gradient = _on(gradient, device)
            call.entering = {place: _on(value, device) for place, value in entering[layer].items()}
            if layer >= way.back:
                call.arrival = None


def _gradients(sample: SamplePass) -> tuple[list[list[Tensor | None]], list[dict[int, Tensor]]]:
    """What has come back to each block's outputs, and to arguments that are computed outside the blocks."""
    return [[output.gradient for output in call.outputs()] for call in sample.calls], [
        dict(call.entering) for call in sample.calls
    ]


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)
