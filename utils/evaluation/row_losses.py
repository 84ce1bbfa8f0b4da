"""Losses of rows from final hidden states: the sum over the scored tokens of each row, in nats."""

import torch
from torch.nn.functional import cross_entropy

from utils.evaluation.encoding import ScoredBatch
from utils.passes.language_head import ToLogits

_ENTRIES = 2**26  # of a piece of the logits: 256 MiB in float32


def logits_bytes(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that `row_losses` takes for so many scored tokens: a piece of the logits, its log-probabilities, both float32
    where the model computes in another dtype."""
    entries = min(tokens, max(1, _ENTRIES // vocabulary)) * vocabulary
    return entries * (8 if dtype == torch.float32 else 8 + dtype.itemsize)


def row_losses(finals: torch.Tensor, scored: ScoredBatch, to_logits: ToLogits, vocabulary: int) -> list[float]:
    """The negative log-likelihood of each row's scored tokens, summed.

    Logits are computed for the scored tokens only, in pieces, in the model's dtype; log-probabilities in float32, sums
    in float64.

    Args:
        finals: [rows, length, hidden], what the model's body gives.
        scored: the batch that they are of.
        to_logits: final hidden states to logits.
        vocabulary: width of the logits, to size the pieces.

    Returns:
        One number a row, not finite where a logit is not; 0 for a row without scored tokens.
    """
    spans = [(max(1, first), length) for first, length in zip(scored.firsts, scored.batch.lengths, strict=True)]
    places = [torch.arange(first - 1, stop - 1) for first, stop in spans]
    owners = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([len(each) for each in places]))
    owners, positions = owners.to(finals.device), torch.cat(places).to(finals.device)
    targets = scored.batch.input_ids.to(finals.device)[owners, positions + 1]
    sums = torch.zeros(len(spans), dtype=torch.float64, device=finals.device)
    at_once = max(1, _ENTRIES // vocabulary)
    for start in range(0, len(positions), at_once):
        piece = slice(start, start + at_once)
        logits = to_logits(finals[owners[piece], positions[piece]])
        losses = cross_entropy(logits.float(), targets[piece], reduction="none")
        sums.index_add_(0, owners[piece], losses.double())
    return sums.tolist()
