"""Which parameters choose a mixture's experts: found from the structure of a block, whatever they are called.

A mixture is a module that holds experts (stacks of matrices) and, beside them, what gives each token one number for each
expert: the router. Routers of transformers' models are a matrix, or a small chain of matrices, that ends in as many rows
as there are experts (or a few more, for experts that are shared or do nothing); shared experts, attention and the like end
in the width of the hidden states. What else belongs to a choice (a bias of the scores, a scale) lies in the router's
module or right beside it, one number for each row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint
from utils.models.decoder import find_blocks, is_experts
from utils.models.headers import TensorHeader
from utils.models.stored_layout import StoredLayout, stored_layout
from utils.models.tensor_files import TensorFiles
from utils.models.weight_source import build_skeleton


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts inside a block, by module paths there.

    Attributes:
        path: the module that holds router and experts; "" is the block itself.
        experts: the modules that hold the experts' matrices.
        router: the names of the router's parameters and stored buffers; none where it cannot be told by its shapes.
    """

    path: str
    experts: tuple[str, ...]
    router: tuple[str, ...]


def find_mixtures(block: nn.Module, hidden: int | None) -> tuple[Mixture, ...]:
    """The mixtures of a block.

    Args:
        block: a decoder block; parameters may be on the meta device.
        hidden: the width of the hidden states.
    """
    holders: dict[str, list[str]] = {}
    for path, module in block.named_modules():
        if _holds_stack(module):
            holders.setdefault(path.rpartition(".")[0], []).append(path)
    found = []
    for path, stacks in holders.items():
        module = block.get_submodule(path)
        sizes = [value.shape[0] for stack in stacks for value in block.get_submodule(stack)._parameters.values()]
        candidates = _routers(module, set(stacks), path, max(sizes), hidden)
        if len(candidates) == 1:
            found.append(Mixture(path, tuple(stacks), tuple(_own_names(module, path, *candidates[0]))))
        elif any(is_experts(block.get_submodule(stack)) for stack in stacks):
            found.append(Mixture(path, tuple(stacks), ()))
    return tuple(found)


def router_parameters(model: nn.Module, where: str) -> tuple[str, ...]:
    """The full names of the parameters and stored buffers of all routers of a model, in the order of the blocks.

    Raises:
        UserError: no module beside the experts, or several, can be their router.
    """
    found = []
    for path, mixture in mixtures_of(model, where):
        if not mixture.router:
            raise UserError(
                f"{where}: which part beside {path}.{mixture.experts[0]} chooses the experts cannot be told by its shape; "
                "--router merge merges everything alike",
                "router-unknown",
            )
        found += [f"{path}.{name}" for name in mixture.router]
    return tuple(found)


def mixtures_of(model: nn.Module, where: str) -> Iterator[tuple[str, Mixture]]:
    """Each mixture of a model, with the path of its block."""
    path, blocks = find_blocks(model, where)
    hidden = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    for layer, block in enumerate(blocks):
        for mixture in find_mixtures(block, hidden):
            yield f"{path}.{layer}", mixture


def _holds_stack(module: nn.Module) -> bool:
    """Whether a module holds experts' matrices: as transformers' experts do, or as a linear part of many would."""
    weight = module._parameters.get("weight")
    several = weight is not None and weight.ndim == 3 and weight.shape[0] > 1 and not isinstance(module, _ConvNd)
    return is_experts(module) or several


def _routers(module: nn.Module, stacks: set[str], path: str, experts: int, hidden: int | None) -> list[tuple[str, int]]:
    """The children of a module that may be the router of its experts, each with how many numbers it gives.

    Their first matrix takes hidden states, their last one ends in numbers for the experts. Those that give one number for each expert come alone; else those that give up to twice as many.
    """
    found = []
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if any(stack == full or stack.startswith(f"{full}.") for stack in stacks):
            continue
        shapes = [tuple(value.shape) for value in child.parameters() if value.ndim == 2 and min(value.shape) > 1]
        if shapes and shapes[0][1] == hidden and experts <= shapes[-1][0] <= 2 * experts:
            found.append((name, shapes[-1][0]))
    return [one for one in found if one[1] == experts] or found


def _own_names(module: nn.Module, path: str, router: str, rows: int) -> Iterator[str]:
    """The names, inside the block, of a router's parameters and stored buffers, and of those beside it."""
    for name, value in module.state_dict().items():
        beside = "." not in name and tuple(value.shape) == (rows,)
        if beside or name.startswith(f"{router}."):
            yield f"{path}.{name}" if path else name


def routers_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The stored names of a checkpoint's routers; none of a model that is no mixture. No weights are read.

    Raises:
        UserError: transformers cannot build it; its routers cannot be told from its other parts.
    """
    if not any(len(header.shape) > 2 or _has_two_numbers(name) for name, header in checkpoint.tensors.items()):
        return ()  # experts are stacked, or numbered inside a numbered block

    model = build_skeleton(checkpoint, torch.float32, trust_remote_code)
    layout = stored_layout(model, checkpoint)
    names = router_parameters(model, f"model {checkpoint.name}")
    return tuple(stored for name in names for stored in layout.stored_names(name))


def stored_routers(model: nn.Module, layout: StoredLayout, where: str) -> list[str]:
    """The stored names of those routers of a model that can be told from other parts."""
    names = [f"{path}.{name}" for path, mixture in mixtures_of(model, where) for name in mixture.router]
    return [stored for name in names for stored in layout.stored_names(name)]


def _has_two_numbers(name: str) -> bool:
    return sum(part.isdigit() for part in name.split(".")) > 1


def are_alike(groups: Sequence[Sequence[TensorHeader]]) -> bool:
    """Whether the tensors of each group hold the very same numbers; reads them, one group at a time.

    Raises:
        UserError: a file cannot be read.
    """
    with TensorFiles(header.file for group in groups for header in group) as files:
        for first, *others in groups:
            if any(math.prod(one.shape) != math.prod(first.shape) for one in others):
                return False
            value = files.read_whole(first)
            if any(not bool((files.read_whole(one) == value).all()) for one in others):
                return False
    return True
