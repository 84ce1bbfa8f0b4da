"""Samples padded to one length, which go through the model together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded samples that go through a block together.

    `input_ids` [samples, length] are token ids (int64), `lengths` how many of each sample's are real (the first ones),
    `mask` (bool, as `input_ids`) says which, None that all are.
    """

    input_ids: torch.Tensor
    lengths: tuple[int, ...]
    mask: torch.Tensor | None

    @classmethod
    def of(cls, samples: Sequence[Sequence[int]], pad_id: int = 0) -> "MicroBatch":
        """Pad token lists to the longest of them."""
        lengths = tuple(len(ids) for ids in samples)
        longest = max(lengths)
        padded = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in samples])
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return cls(padded, lengths, None if min(lengths) == longest else mask)

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return MicroBatch(self.input_ids.to(device), self.lengths, mask)
