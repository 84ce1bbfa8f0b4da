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


def sample_order(encoded: Sequence[Sequence[int]]) -> list[int]:
    """The samples' numbers in the order in which `micro_batches` takes them: long ones first."""
    return sorted(range(len(encoded)), key=lambda place: len(encoded[place]), reverse=True)


def micro_batches(encoded: Sequence[Sequence[int]], tokens_at_once: int, pad_id: int) -> list[MicroBatch]:
    """Group samples of similar length into right-padded micro-batches of at most `tokens_at_once` tokens.

    A sample longer than that is a micro-batch of its own. Pads are masked.
    """
    groups: list[list[Sequence[int]]] = []
    for ids in (encoded[place] for place in sample_order(encoded)):
        if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= tokens_at_once:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return [MicroBatch.of(group, pad_id) for group in groups]


def reference_batches(
    encoded: Sequence[Sequence[int]], seqlen: int, tokens_at_once: int, pad_id: int, left: bool
) -> list[MicroBatch]:
    """Micro-batches as the reference makes them: every sample padded to `seqlen`, pads attended and counted."""
    rows = []
    for ids in encoded:
        pads = [pad_id] * (seqlen - len(ids))
        rows.append([*pads, *ids] if left else [*ids, *pads])
    at_once = max(1, tokens_at_once // seqlen)
    return [MicroBatch.of(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
