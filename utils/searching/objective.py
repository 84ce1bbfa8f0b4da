"""What the search makes as large as it can: how much of each expert's gain over the base a merge keeps, as one number.

    gain_t(c) = (loss_t(base) - loss_t(c)) / (loss_t(base) - loss_t(expert of t))     1 is as good as the expert, 0 as the base
    mean      = sum_t w_t gain_t,  w_t equal or as given, adding up to 1
    worst     = min_t gain_t


Losses are nats per token of the base's tokens, so that models with other tokenizers are compared on the same text. All
figures are linear in a candidate's losses but for the choice of the worst task, which is what `slopes` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["mean", "worst", "weighted"]
NO_GAIN = 0.005  # an expert's gain below this share of the base's loss divides nothing: the loss itself does


@dataclass(frozen=True)
class Objective:
    """How the gains of `tasks` become one figure. `weights` [tasks] add up to 1; `worst` takes the least gain instead."""

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    worst: bool = False

    @classmethod
    def of(cls, kind: Kind, tasks: Sequence[str], weights: Mapping[str, float]) -> "Objective":
        """The objective of a name; `weights` (by task, of the tasks given) count for `weighted` alone."""
        given = [weights.get(task, 0.0) if kind == "weighted" else 1.0 for task in tasks]
        return cls(tuple(tasks), tuple(weight / sum(given) for weight in given), kind == "worst")

    def figure(self, gains: np.ndarray) -> np.ndarray:
        """The figure of gains [..., tasks], float64 [...]."""
        return gains.min(axis=-1) if self.worst else gains @ np.asarray(self.weights)

    def slopes(self, gains: np.ndarray) -> np.ndarray:
        """How the figure changes with each task's gain, at gains [..., tasks]; of the same shape."""
        if not self.worst:
            return np.broadcast_to(np.asarray(self.weights), gains.shape)
        return np.eye(gains.shape[-1])[gains.argmin(axis=-1)]


def gain_scales(base: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """What each task's loss below the base's is divided by: the expert's gain, or the base's loss where there is none.

    Args:
        base: the base's loss [tasks].
        experts: each task's expert's loss [tasks]; NaN for a task without an expert.

    Returns:
        The scales [tasks], above 0, and the positions of the tasks without a gain to speak of.
    """
    gain = base - experts
    usable = gain > NO_GAIN * base
    return np.where(usable, gain, base), [int(place) for place in np.flatnonzero(~usable)]
