"""Steps of Adam on a table of coefficients, judged on samples of their own: pure, but for what evaluates a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

_SHARPNESS = 10.0  # of the largest share lost, in `worst`: one tenth of a gain less weighs e times as much
_PATIENCE = 3  # steps without a better judgement

Weigh = Callable[[Sequence[float]], list[float]]
Slope = Callable[[Tensor, Weigh], tuple[list[float], Tensor]]
"""Given coefficients [experts, groups] and how losses weigh: the losses by task, and the gradient of the weighed sum."""


@dataclass(frozen=True)
class Asked:
    """How to descend: steps at most, step size, pull to 1, whether mostly for the worst task."""

    steps: int
    rate: float
    pull: float
    worst: bool


@dataclass(frozen=True)
class Step:
    """One table of coefficients: losses by task of the samples stepped on (None: no step was made from it) and held out."""

    losses: tuple[float, ...] | None
    held_out: tuple[float, ...]
    lost: float


@dataclass(frozen=True)
class Descent:
    """The best table [experts, groups], which step it is, and all steps from the start on."""

    coefficients: Tensor
    best: int
    steps: tuple[Step, ...]


def share_lost(losses: Sequence[float], experts: Sequence[float], gains: Sequence[float], worst: bool) -> float:
    """The share of the experts' gains that a merge loses: the mean over tasks, or nearly the largest.

    With lost_t = (loss_t - expert_t) / gain_t: mean of lost_t, or log(mean of exp(s lost_t)) / s with s = 10.
    """
    lost = torch.tensor([(loss - own) / gain for loss, own, gain in zip(losses, experts, gains, strict=True)])
    if not worst:
        return float(lost.mean())
    return float((torch.logsumexp(_SHARPNESS * lost.double(), 0) - torch.tensor(len(lost)).log()) / _SHARPNESS)


def loss_weights(losses: Sequence[float], experts: Sequence[float], gains: Sequence[float], worst: bool) -> list[float]:
    """The derivative of `share_lost` by each task's loss."""
    lost = torch.tensor([(loss - own) / gain for loss, own, gain in zip(losses, experts, gains, strict=True)])
    shares = torch.softmax(_SHARPNESS * lost.double(), 0) if worst else torch.full((len(lost),), 1 / len(lost))
    return [float(share) / gain for share, gain in zip(shares, gains, strict=True)]


def descend(
    shape: tuple[int, int],
    asked: Asked,
    experts: tuple[Sequence[float], Sequence[float]],
    gains: Sequence[float],
    slope: Slope,
    held_out: Callable[[Tensor], list[float]],
    resumed: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda state: None,
) -> Descent:
    """Step from a table of ones down the share lost, plus pull / 2 times the mean of (a - 1)^2.

    Args:
        shape: experts and groups.
        asked: how.
        experts: by task, the loss of the task's expert: on the samples to step on, and on those held out.
        gains: by task, how much lower it is than the base's; what losses are divided by.
        slope: evaluates a table on the samples to step on.
        held_out: losses by task of a table on samples that are not stepped on.
        resumed: where to go on, as `keep` was given it by a descent that was cut; the end is the same to the bit.
        keep: takes the whole state after each step, plain data and tensors.

    Returns:
        The table that loses least on what is held out; the steps end where it did not get better for a while.
    """
    stepped_on, kept_back = experts
    table = torch.ones(shape, dtype=torch.float64)
    optimizer = torch.optim.Adam([table], lr=asked.rate)
    steps: list[Step] = []
    best, kept = 0, table.clone()
    if resumed is not None:
        table.copy_(resumed["table"])
        optimizer.load_state_dict(resumed["optimizer"])
        steps = [Step(*one) for one in resumed["steps"]]
        best, kept = resumed["best"], resumed["kept"]
    for number in range(len(steps), asked.steps + 1):
        judged = held_out(table)
        lost = share_lost(judged, kept_back, gains, asked.worst)
        if number and lost < steps[best].lost:
            best, kept = number, table.clone()
        if number == asked.steps or number - best >= _PATIENCE:
            steps.append(Step(None, tuple(judged), lost))
            break
        losses, gradient = slope(table, lambda found: loss_weights(found, stepped_on, gains, asked.worst))
        steps.append(Step(tuple(losses), tuple(judged), lost))
        table.grad = gradient.double() + asked.pull * (table - 1) / table.numel()
        optimizer.step()
        state = {"table": table, "optimizer": optimizer.state_dict(), "steps": [astuple(one) for one in steps]}
        keep({**state, "best": best, "kept": kept})
    return Descent(kept, best, tuple(steps))
