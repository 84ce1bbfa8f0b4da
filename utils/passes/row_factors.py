"""What the gradients of embeddings and heads are made of, so that the Gram matrix of their rows costs next to nothing.

One sample's gradient of a head is P' X, of an embedding S' D: with T tokens P [T, v] are the gradients of the logits, X
[T, d] the head's inputs, S [T, v] the tokens as unit rows, D [T, d] the gradients of the embedded tokens. Under each other
(a tied weight has both) they are G = L' R with r rows, and

    G' G = R' (L L') R         at r^2 v operations instead of v d^2

which pays where a sample has fewer tokens than hidden channels. Only modules that do what `nn.Linear` and `nn.Embedding`
do are watched; that nothing else went into a gradient is shown by its product with a random vector (Freivalds' check).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_COLUMNS = 2**22  # entries of a gradient of logits in float32 together
_CLOSE, _ROUNDED = 1e-4, 2e-2  # relative: the check is computed in float32; 16 bits have rounded the gradient


@dataclass
class _Use:
    """One call of a module: `left` are tokens [T] or gradients of logits [T, v], `right` [T, d]; None until known."""

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def is_tokens(self) -> bool:
        return not self.left.is_floating_point()


@dataclass
class RowFactors:
    """The uses of embeddings and heads in one sample's pass, by the name of their weight."""

    _uses: dict[str, list[_Use]] = field(default_factory=dict)

    @contextlib.contextmanager
    def observed(self, model: nn.Module) -> Iterator[None]:
        """Watch a causal language model, whose embedding and head are in memory, while it goes forward and back once."""
        self._uses = {}
        handles = []
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            watch = _watcher(module)
            if watch is not None:
                names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is module.weight]
                uses: list[_Use] = next((self._uses[name] for name in names if name in self._uses), [])
                self._uses |= dict.fromkeys(names, uses)
                handles.append(module.register_forward_hook(watch(uses)))
        try:
            yield
        finally:
            self._uses = {}
            for handle in handles:
                handle.remove()

    def gram(self, name: str, gradient: Tensor) -> Tensor | None:
        """G' G [d, d], float32, of a sample's gradient G [v, d] of a weight, by its factors.

        None where they are not known, are not all that went into it, or have no fewer rows than G has columns.
        """
        uses = [use for use in self._uses.get(name, ()) if use.left is not None and use.right is not None]
        if not uses or sum(len(use.right) for use in uses) >= gradient.shape[1]:
            return None
        right = torch.cat([use.right for use in uses]).float()
        if not _explained(gradient, uses, right):
            return None
        products = [torch.cat([_left_product(one, other) for other in uses], dim=1) for one in uses]
        return right.t() @ (torch.cat(products) @ right)


def _watcher(module: nn.Module | None):
    """What makes a forward hook of a module for a list of uses; None for a module that does more than its kind."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return _watched_linear
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        alters = module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq
        return None if alters else _watched_embedding
    return None


def _watched_linear(uses: list[_Use]):
    def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad and args:
            use = _Use(right=args[0].detach().reshape(-1, args[0].shape[-1]))
            uses.append(use)
            output.register_hook(lambda gradient: _set_left(use, gradient.detach().reshape(-1, gradient.shape[-1])))

    return watch


def _watched_embedding(uses: list[_Use]):
    def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad and args:
            use = _Use(left=args[0].reshape(-1))
            uses.append(use)
            output.register_hook(lambda gradient: _set_right(use, gradient.detach().reshape(-1, gradient.shape[-1])))

    return watch


def _set_left(use: _Use, value: Tensor) -> None:
    use.left = value


def _set_right(use: _Use, value: Tensor) -> None:
    use.right = value


def _left_product(one: _Use, other: _Use) -> Tensor:
    """The part of L L' of two uses, [T, T'] float32."""
    if one.is_tokens and other.is_tokens:
        return (one.left[:, None] == other.left[None, :]).float()
    if one.is_tokens:
        return _left_product(other, one).t()
    if other.is_tokens:
        return one.left[:, other.left].float()
    at_once = max(1, _COLUMNS // len(one.left))
    pairs = zip(one.left.split(at_once, dim=1), other.left.split(at_once, dim=1), strict=True)
    return sum(mine.float() @ theirs.float().t() for mine, theirs in pairs)


def _explained(gradient: Tensor, uses: list[_Use], right: Tensor) -> bool:
    """Whether G z = L' (R z) for a random z, but for rounding."""
    z = torch.randn(gradient.shape[1], generator=torch.Generator().manual_seed(0)).to(gradient.device)
    seen = gradient @ z.to(gradient.dtype)
    found, start = torch.zeros_like(seen, dtype=torch.float32), 0
    for use in uses:
        part = right[start : start + len(use.right)] @ z
        start += len(use.right)
        if use.is_tokens:
            found.index_add_(0, use.left, part)
        else:
            found += (part.to(use.left.dtype) @ use.left).float()
    tolerance = _ROUNDED if gradient.dtype.itemsize < 4 else _CLOSE
    return bool((found - seen.float()).norm() <= tolerance * seen.float().norm())
