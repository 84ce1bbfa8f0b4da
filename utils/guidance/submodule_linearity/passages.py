"""The texts that models are compared on, micro-batch by micro-batch: what belongs to which text, sample and expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.guidance.submodule_linearity.folds import fold_tokens, sample_folds
from utils.guidance.submodule_linearity.part_changes import Passage
from utils.models.decoder import Decoder
from utils.pair.batches import MicroBatch


@dataclass(frozen=True)
class ComparedText:
    """A text in the base's tokens; `experts` are the places of those whose own text it is."""

    batches: Sequence[MicroBatch]
    experts: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        """Real tokens in each fold."""
        return fold_tokens(self.batches)


def passages_of(
    texts: Sequence[ComparedText], decoder: Decoder, device: torch.device
) -> tuple[list[MicroBatch], list[Passage]]:
    """All micro-batches of all texts, in order, and what is known of each."""
    batches, passages = [], []
    for number, text in enumerate(texts):
        for batch, folds in zip(text.batches, sample_folds(text.batches), strict=True):
            batches.append(_with_an_axis_of_tokens(batch, decoder))
            passages.append(_passage(batches[-1].to(device), number, folds, text.experts))
    return batches, passages


def _passage(batch: MicroBatch, text: int, folds: Sequence[int], scored: tuple[int, ...]) -> Passage:
    samples, length = batch.input_ids.shape
    own = torch.tensor(folds, device=batch.input_ids.device)
    return Passage(text, samples, length, batch.mask, own, scored)


def _with_an_axis_of_tokens(batch: MicroBatch, decoder: Decoder) -> MicroBatch:
    """The micro-batch, one pad longer where its length equals a number of heads, so that axes can be told apart."""
    if batch.mask is None:
        return batch
    config = decoder.model.config.get_text_config(decoder=True)
    heads = {getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    while batch.input_ids.shape[1] in heads:
        ids = torch.cat([batch.input_ids, batch.input_ids[:, -1:]], dim=1)
        batch = MicroBatch(ids, batch.lengths, nn.functional.pad(batch.mask, (0, 1)))
    return batch
