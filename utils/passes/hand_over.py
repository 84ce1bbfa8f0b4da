"""Gradients of parameters, handed over as soon as a backward pass has them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HandOver = Callable[[str, Tensor, Tensor], None]
"""Takes a parameter's name, its value and its gradient."""


@contextmanager
def handed_over(parameters: Mapping[str, nn.Parameter], hand_over: HandOver) -> Iterator[None]:
    """Hand each parameter's gradient over as soon as a backward pass has it, and let go of it.

    Args:
        parameters: by name; those that do not require a gradient are passed over.
        hand_over: takes name, value and gradient; gradients are not recorded meanwhile.
    """

    def hook(name: str) -> Callable[[nn.Parameter], None]:
        def take(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:  # of a stack whose experts each handed over their own
                return
            with torch.no_grad():
                hand_over(name, parameter.detach(), gradient)

        return take

    wanted = [(name, value) for name, value in parameters.items() if value.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(hook(name)) for name, parameter in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, parameter in wanted:
            parameter.grad = None
