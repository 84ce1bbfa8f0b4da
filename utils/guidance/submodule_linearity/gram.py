"""Gram matrices of changes: the inner products of what several fine-tunes change about one and the same output.

    G[m,s] = sum over tokens x of < Delta_m(x), Delta_s(x) >,   Delta_s(x) = f(x; theta_s) - f(x; theta_0)

Products are float32, sums of many of them float64. Nothing here waits for a GPU.
"""

from collections.abc import Iterable, Sequence

import torch

from utils.errors import UserError

_SUMMED_IN_FLOAT32 = 2**12  # products; longer sums go on in float64
_ENTRIES_AT_ONCE = {"cpu": 2**18}  # of each change; elsewhere:
_ANYWHERE_ELSE = 2**24
_ROWS_BETWEEN_TRIANGLES = 4096


class NoTokenAxis(UserError):
    """An output in which the tokens cannot be told apart."""


def require_token_axis(shape: Sequence[int], samples: int, length: int, what: str) -> None:
    """Raise `NoTokenAxis` for the shape of an output in which tokens cannot be told apart (see `token_rows`)."""
    if _axis_of_tokens(shape, samples, length) is None and shape[0] != samples * length:
        raise NoTokenAxis(
            f"{what} gives {list(shape)} for {samples} samples of {length} tokens; it does not process each token once "
            "and cannot be measured",
            "model-unsupported",
        )


def _axis_of_tokens(shape: Sequence[int], samples: int, length: int) -> int | None:
    """The axis that has an entry for each token, or one that is the same for them all ([samples, 1, width])."""
    if len(shape) < 2 or shape[0] not in (1, samples):
        return None
    if length in shape[1:]:
        return tuple(shape).index(length, 1)
    return 1 if len(shape) == 3 and shape[1] == 1 else None


def token_rows(output: torch.Tensor, samples: int, length: int, mask: torch.Tensor | None, what: str) -> torch.Tensor:
    """An output for right-padded samples as one float32 row per token, rows of pads being zero.

    Args:
        output: [samples, length, ...], or with its axis of tokens elsewhere behind the first ([samples, heads, length,
            width]; the first axis of that size counts), or [samples * length, ...]; the axis of samples may have size 1
            where all samples have the same, and in [samples, 1, width] that of tokens, where all tokens have.
        samples, length: of the micro-batch.
        mask: which tokens are real (bool [samples, length]), None for all.
        what: the module, for the message.

    Returns:
        [samples * length, features].

    Raises:
        UserError: the output has no axis of tokens.
    """
    shape = tuple(output.shape)
    require_token_axis(shape, samples, length, what)
    if (axis := _axis_of_tokens(shape, samples, length)) is not None:
        rows = output.movedim(axis, 1)
        rows = rows.expand(samples, length, *rows.shape[2:]).reshape(samples, length, -1)
    else:
        rows = output.reshape(samples, length, -1)
    rows = rows.float()
    if mask is not None:
        rows = torch.where(mask[:, :, None], rows, 0.0)
    return rows.reshape(samples * length, -1)


def gram_matrix(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of T float32 tensors of one shape, each with each.

    Returns:
        [T, T] float64, symmetric.
    """
    first = changes[0]
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64, device=first.device)
    at_once = _ENTRIES_AT_ONCE.get(first.device.type, _ANYWHERE_ELSE)
    for pieces in zip(*(change.reshape(-1).split(at_once) for change in changes), strict=True):
        stacked = torch.stack(pieces)
        short = -stacked.shape[1] % _SUMMED_IN_FLOAT32
        parts = torch.nn.functional.pad(stacked, (0, short)).view(len(changes), -1, _SUMMED_IN_FLOAT32).transpose(0, 1)
        total += (parts @ parts.mT).sum(dim=0, dtype=torch.float64)
    return (total + total.T) / 2


def gram_matrices(changes: Sequence[torch.Tensor], samples: int) -> torch.Tensor:
    """`gram_matrix` of each sample's own rows.

    Args:
        changes: T float32 tensors [samples * rows, ...], a sample's rows together.
        samples: how many there are.

    Returns:
        [samples, T, T] float64.
    """
    parted = [change.reshape(samples, -1) for change in changes]
    return torch.stack([gram_matrix(own) for own in zip(*parted, strict=True)])


class TriangularRoot:
    """A small matrix R with R^T R = X^T X, for a matrix X of which no more than a few thousand rows are held.

    What a linear map of the rows of X does, summed over rows, it does as well to the rows of R; and unlike X^T X, R
    holds no squares, in which small numbers beside large ones are lost.
    """

    def __init__(self) -> None:
        self._held: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Append rows of X, [rows, width] float32."""
        self._held.append(rows)
        if sum(map(len, self._held)) >= max(_ROWS_BETWEEN_TRIANGLES, 2 * rows.shape[1]):
            self._held = [self._triangle()]

    def value(self) -> torch.Tensor:
        """R, [at most width, width] float32."""
        return self._triangle()

    def _triangle(self) -> torch.Tensor:
        rows = torch.cat(self._held)
        return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def gram_of_linear_maps(changes: Iterable[Sequence[torch.Tensor]], roots: Sequence[torch.Tensor]) -> torch.Tensor:
    """`gram_matrix` of the outputs of linear maps: G[m,s] = tr(dW_m C dW_s^T), C = R^T R, for all inputs of a root at once.

    Args:
        changes: for one piece of the outputs after the other, dW [outputs, inputs] of each of T maps, float32.
        roots: R [rows, inputs] float32 of each set of inputs (see `TriangularRoot`).

    Returns:
        [roots, T, T] float64, symmetric.
    """
    return sum(torch.stack([gram_matrix([change @ root.T for change in piece]) for root in roots]) for piece in changes)
