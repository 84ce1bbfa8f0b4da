"""A block whose experts do not fit into fast memory together: each matrix is fetched when the experts' own loop asks for it.

Their stacked parameters stay on the meta device. The loop of an experts module takes `stack[expert]`, and that slice is
read then and let go of after its product; so one matrix of one expert is there at a time, and each is read once for every
micro-batch. Where a graph is recorded it keeps no matrix: what a way back needs of it is read again, and each expert's
gradient is handed over by itself. Where a module multiplies what it gives all its experts with a whole stack at once (Llama
4), that product is made one expert after the other. Nothing else is assumed about an architecture: one that takes its stacks
in another way is refused.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from utils.errors import UserError
from utils.models.decoder import Decoder, is_experts
from utils.models.stored_layout import StoredLayout
from utils.passes.mixed_stacks import MixedStack

_OF_ALL = ("bmm", "matmul", "__matmul__")  # products of what all experts are given with all their matrices
_HARMLESS = ("__get__", "size", "dim", "numel", "stride", "__len__")  # what only asks about a stack
FetchExpert = Callable[[str, int], Tensor]
TakeGradient = Callable[[str, int, Tensor, Tensor], None]
"""Takes a stack's name, an expert's number, that expert's matrix and the gradient of its loss by it."""


def stack_names(decoder: Decoder, layer: int, layout: StoredLayout) -> tuple[str, ...]:
    """The names, in the model, of a block's stacks of experts' matrices that can be read one expert at a time."""
    path = f"{decoder.blocks_path}.{layer}"
    found = (
        f"{path}.{module_path}.{name}"
        for module_path, module in decoder.blocks[layer].named_modules()
        if is_experts(module)
        for name, value in module.named_parameters(recurse=False)
        if value.ndim == 3
    )
    return tuple(name for name in found if layout.can_take_expert(name))


def block_bytes(decoder: Decoder, layer: int, without: Sequence[str] = ()) -> int:
    """Bytes of a block's parameters in the model's dtype, those of some names left out."""
    path, left_out = f"{decoder.blocks_path}.{layer}", set(without)
    named = decoder.blocks[layer].named_parameters()
    return sum(value.nbytes for name, value in named if f"{path}.{name}" not in left_out)


def outside_bytes(decoder: Decoder) -> int:
    """Bytes of what lies outside the blocks, the head aside."""
    return sum(value.nbytes for value in decoder.body.parameters()) - sum(
        block_bytes(decoder, layer) for layer in range(len(decoder.blocks))
    )


def parts_bytes(decoder: Decoder, layout: StoredLayout) -> tuple[int, int, int]:
    """What is there of a model at least at a time: all that lies outside the blocks with the largest block whole, the same
    with the experts of blocks in parts, and the largest matrix of an expert; bytes in the model's dtype."""
    whole, apart, matrix = 0, 0, 0
    for layer, block in enumerate(decoder.blocks):
        names = stack_names(decoder, layer, layout)
        own = dict(block.named_parameters())
        prefix = f"{decoder.blocks_path}.{layer}."
        matrix = max([matrix, *(own[name.removeprefix(prefix)][0].nbytes for name in names)])
        whole, apart = max(whole, block_bytes(decoder, layer)), max(apart, block_bytes(decoder, layer, names))
    outside = outside_bytes(decoder)
    return outside + whole, outside + apart, matrix


def do_not_fit(decoder: Decoder, layout: StoredLayout, free: int) -> bool:
    """Whether a model's largest block does not fit beside what lies outside the blocks into so many bytes, but for experts."""
    whole, apart, _ = parts_bytes(decoder, layout)
    return apart < whole and whole > free


@contextlib.contextmanager
def experts_in_parts(
    decoder: Decoder, layer: int, names: Sequence[str], fetch: FetchExpert
) -> Iterator["ExpertMatrices"]:
    """While the context lasts, `stack[expert]` of a block's stacks of these names is that expert's matrix, fetched.

    The experts run one after the other meanwhile.
    """
    block, path = decoder.blocks[layer], f"{decoder.blocks_path}.{layer}."
    stacks = {id(value): (value, path + name) for name, value in block.named_parameters() if path + name in names}
    owners = {name.removeprefix(path).rpartition(".")[0] for name in names}
    configs = [
        config for owner in owners if (config := getattr(block.get_submodule(owner), "config", None)) is not None
    ]
    before = [getattr(config, "_experts_implementation", None) for config in configs]
    for config in configs:
        config._experts_implementation = "eager"
    matrices = ExpertMatrices(stacks, fetch)
    for stack, name in stacks.values():
        stack.matrix_of = partial(fetch, name)
    try:
        with matrices, saved_tensors_hooks(matrices.pack, matrices.unpack):
            yield matrices
    finally:
        for stack, _ in stacks.values():
            del stack.matrix_of
        for config, value in zip(configs, before, strict=True):
            config._experts_implementation = value


def origin(matrix: Tensor) -> tuple[Tensor, int] | None:
    """The stack and the expert that a fetched matrix is of; None of any other tensor."""
    return getattr(matrix, "_expert_of", None)


@dataclass(frozen=True)
class _Place:
    """Which matrix a storage holds, as long as it lives."""

    storage: StorageWeakRef
    name: str
    expert: int


@dataclass(frozen=True)
class _Packed:
    """A view of an expert's matrix that a graph has kept."""

    name: str
    expert: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ExpertMatrices(TorchFunctionMode):
    """Fetches what is asked of stacks, given by identity with their names; for a way back, fetches it again."""

    def __init__(self, stacks: Mapping[int, tuple[nn.Parameter, str]], fetch: FetchExpert) -> None:
        super().__init__()
        self.stacks, self.fetch = stacks, fetch
        self._alive: dict[int, _Place] = {}
        self._again: tuple[str, int, Tensor] | None = None  # the matrix that a way back has read last
        self._take: TakeGradient | None = None
        self._taken: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def handing_over(self, take: TakeGradient) -> Iterator[None]:
        """Hand over the gradients of the experts' matrices that one way back comes to, of stacks that require a gradient.

        Raises:
            UserError: one is come to twice, so that what is handed over would be a part of its gradient.
        """
        self._take, self._taken = take, set()
        try:
            yield
        finally:
            self._take, self._again = None, None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in args:
            if isinstance(value, MixedStack):
                stack, name = value, ""
            elif id(value) in self.stacks:
                stack, name = self.stacks[id(value)]
            else:
                continue
            if func is Tensor.__getitem__ and value is args[0] and _is_one(args[1]):
                return self._matrix(stack, name, int(args[1]))
            if getattr(func, "__name__", "") in _OF_ALL and _is_for_all(args, stack):
                return torch.stack([rows @ self._matrix(stack, name, expert) for expert, rows in enumerate(args[0])])
            if func is Tensor.detach:  # as a list of a module's state does
                return stack
            if getattr(func, "__name__", "") not in _HARMLESS:
                raise UserError(
                    f"{name} does not fit into memory, and this architecture does not take its experts one after the other "
                    f"(it calls {getattr(func, '__name__', func)} on all of them); use --device cpu, or a machine with more",
                    "experts-not-in-parts",
                )
        return func(*args, **(kwargs or {}))

    def _matrix(self, stack: nn.Parameter, name: str, expert: int) -> Tensor:
        if isinstance(stack, MixedStack):
            return stack.matrix_of(expert)
        if torch.is_grad_enabled() and stack.requires_grad:
            matrix = _Fetched.apply(stack, self, name, expert)
        else:
            matrix = self.fetch(name, expert)
        storage = matrix.untyped_storage()
        self._alive = {key: one for key, one in self._alive.items() if not one.storage.expired()}
        self._alive[storage._cdata] = _Place(StorageWeakRef(storage), name, expert)
        matrix._expert_of = (stack, expert)
        return matrix

    def pack(self, value: Tensor) -> Tensor | _Packed:
        """What a graph keeps of a tensor: of an expert's matrix its place alone."""
        place = self._alive.get(value.untyped_storage()._cdata)
        if place is None or place.storage.expired():
            return value
        return _Packed(place.name, place.expert, value.size(), value.stride(), value.storage_offset())

    def unpack(self, kept: Tensor | _Packed) -> Tensor:
        """The tensor that a graph has kept."""
        if isinstance(kept, Tensor):
            return kept
        return self._read_again(kept.name, kept.expert).as_strided(kept.size, kept.stride, kept.offset)

    def _read_again(self, name: str, expert: int) -> Tensor:
        if self._again is None or self._again[:2] != (name, expert):
            self._again = None  # before the next is there
            self._again = (name, expert, self.fetch(name, expert))
        return self._again[2]

    def hand_over(self, name: str, expert: int, gradient: Tensor) -> None:
        """Give an expert's gradient to whoever takes them."""
        if self._take is None:
            return
        if (name, expert) in self._taken:
            raise UserError(
                f"{name} does not fit into memory, and this architecture takes expert {expert} of it twice; use --device cpu, "
                "or a machine with more",
                "experts-not-in-parts",
            )
        self._taken.add((name, expert))
        with torch.no_grad():
            self._take(name, expert, self._read_again(name, expert), gradient)


class _Fetched(torch.autograd.Function):
    """An expert's matrix, whose gradient is handed over."""

    @staticmethod
    def forward(ctx: FunctionCtx, stack: nn.Parameter, matrices: ExpertMatrices, name: str, expert: int) -> Tensor:
        ctx.matrices, ctx.place = matrices, (name, expert)
        return matrices.fetch(name, expert)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.matrices.hand_over(*ctx.place, gradient)
        return None, None, None, None


def _is_for_all(args: Sequence[Any], stack: nn.Parameter) -> bool:
    """Whether these are the rows [experts, rows, in] of all experts, and the stack [experts, in, out]."""
    return len(args) == 2 and args[1] is stack and args[0].ndim == 3 and len(args[0]) == len(stack)


def _is_one(index: Any) -> bool:
    """Whether an index means one expert."""
    return type(index) is int or (
        isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    )
