"""What the quality benchmark measures of a model: loss on held-out text, and how much of an expert's gain is left."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

IGNORED = -100
TOKENS_AT_ONCE = 2048


def token_rows(tokenizer: object, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own special tokens, cut off after `longest` tokens."""
    return [ids[:longest] for ids in tokenizer(list(texts))["input_ids"]]


def mean_loss(model: "nn.Module", rows: Sequence[Sequence[int]], tokens_at_once: int = TOKENS_AT_ONCE) -> float:
    """Mean negative log-likelihood over all predicted tokens of all rows: nats per token.

    Args:
        model: a causal language model in evaluation mode. Logits are taken to float32, sums to float64.
        rows: token ids; every token after a row's first is predicted, and all count alike. A row of one counts nothing.
        tokens_at_once: rows of similar length share a batch of at most so many tokens, pads included.

    Raises:
        ValueError: there is nothing to predict.
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with torch.inference_mode():
        for targets in padded_batches(rows, tokens_at_once):
            targets = targets.to(device)
            # Right padding stays out of sight: attention looks left only, and padded targets are not counted.
            logits = model(input_ids=targets.clamp(min=0), use_cache=False).logits[:, :-1].float()
            total += cross_entropy(
                logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            ).double()
            count += int((targets[:, 1:] != IGNORED).sum())
    if not count:
        raise ValueError("no row has a token to predict")
    return total.item() / count


def padded_batches(rows: Sequence[Sequence[int]], tokens_at_once: int) -> "list[torch.Tensor]":
    """Group rows of similar length, longest first; int64 (rows, longest), padded on the right with `IGNORED`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    groups: list[list[torch.Tensor]] = []
    for row in sorted(map(torch.tensor, rows), key=len, reverse=True):
        if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= tokens_at_once:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [pad_sequence(group, batch_first=True, padding_value=IGNORED) for group in groups]


def share_kept(base: float, merged: float, expert: float) -> float:
    """Share of the expert's held-out gain over the base that a merge keeps: 1 as the expert, 0 as the base.

    Below 0 the merge is worse than the base, above 1 better than the expert.

    Raises:
        ValueError: the expert has no gain to keep (its loss is not below the base's).
    """
    if not expert < base:
        raise ValueError(f"the expert (loss {expert}) is no better than the base (loss {base}): no gain to keep")
    return (base - merged) / (base - expert)


def mean_and_least(shares: Mapping[str, float]) -> tuple[float, float]:
    """Mean and minimum over tasks."""
    return sum(shares.values()) / len(shares), min(shares.values())
