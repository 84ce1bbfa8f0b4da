"""Which level a block is best weighed at: its merge at every level, tried on samples that its weights have not seen.

At each level the weights are solved from one half of the folds (`weights.py`, with command 2's defaults). The block so
merged runs on the base's own inputs of the other half, and what it misses of the change that expert t makes there,

    E || f(x; theta_0 + sum_s a_s delta_s) - f(x; theta_t) ||^2  /  E || f(x; theta_t) - f(x; theta_0) ||^2,

is one yardstick for all levels: it holds both how well weights carry over to other text and what is lost where a part is
not linear.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from utils.guidance.submodule_linearity.folds import FOLDS
from utils.guidance.submodule_linearity.method import RIDGE, WEIGHTINGS
from utils.guidance.submodule_linearity.part_changes import Call, PartChanges, Passage
from utils.guidance.submodule_linearity.weights import merging_weights, misfit
from utils.models.weight_source import placed
from utils.passes.mixed_stacks import with_changes

_SOLVED, _TRIED = list(range(0, FOLDS, 2)), list(range(1, FOLDS, 2))


def held_out_misses(
    parts: Sequence[PartChanges],
    blocks: Sequence[nn.Module],
    calls: Sequence[tuple[Call, Passage]],
    tokens: torch.Tensor,
    prefix: str,
) -> dict[tuple[str, int], float]:
    """What a merge of one block at each level misses of each expert's change of its output.

    Args:
        parts: of the block, with the sums of all text.
        blocks: the base's and each expert's, with their weights.
        calls: the base's calls of the block; the experts that a passage scores are those whose text it is.
        tokens: float64 [texts, folds].
        prefix: the block's path in the model, with a dot behind it.

    Returns:
        By level and expert, without experts that change nothing there. Empty where an expert has no text, or a text
        only one sample.
    """
    text_of = {expert: passage.text for _, passage in calls for expert in passage.scored}
    if len(text_of) < len(blocks) - 1 or not (tokens[:, _TRIED].sum(dim=1) > 0).all():
        return {}
    base_rows = [passage.rows(call.output, "block") for call, passage in calls]
    changes = [
        {expert: _rows(blocks[1 + expert], call, passage) - rows for expert in passage.scored}
        for (call, passage), rows in zip(calls, base_rows, strict=True)
    ]
    whole = _tried_squares(changes, calls)
    texts = [text_of[expert] for expert in sorted(text_of)]
    found = {}
    for level in dict.fromkeys(level for part in parts for level in part.levels):
        own = [part for part in parts if level in part.levels]
        merged = _merged(own, blocks, _solved(own, texts, tokens), prefix)
        with placed(blocks[1], "", merged, base_rows[0].device):
            ours = [
                _rows(blocks[1], call, passage) - rows for (call, passage), rows in zip(calls, base_rows, strict=True)
            ]
        gaps = [{expert: ours[place] - change for expert, change in made.items()} for place, made in enumerate(changes)]
        missed = _tried_squares(gaps, calls)
        found |= {(level, expert): missed[expert] / whole[expert] for expert in whole if whole[expert] > 0}
    return found


def _solved(parts: Sequence[PartChanges], texts: Sequence[int], tokens: torch.Tensor) -> list[Sequence[float]]:
    """The weights of each part, by the first half of the folds; `texts` is each expert's own."""
    found = []
    for part in parts:
        means = part.sums[:, _SOLVED].sum(dim=1).cpu() / tokens[:, _SOLVED].sum(dim=1).cpu()[:, None, None]
        found.append(merging_weights(misfit([means[texts].numpy()], WEIGHTINGS[0]), RIDGE).tolist())
    return found


def _merged(
    parts: Sequence[PartChanges], blocks: Sequence[nn.Module], weights: Sequence[Sequence[float]], prefix: str
) -> Mapping[str, torch.Tensor]:
    """The merged block's parameters by name."""
    base, *experts = (dict(block.named_parameters()) for block in blocks)
    merged = {}
    for part, own in zip(parts, weights, strict=True):
        for name in (full.removeprefix(prefix) for full in part.parameters):
            merged[name] = with_changes(base[name], [expert[name] for expert in experts], own)
    return merged


def _rows(block: nn.Module, call: Call, passage: Passage) -> torch.Tensor:
    return passage.rows(call.made_by(block), "block")


def _tried_squares(
    rows: Sequence[Mapping[int, torch.Tensor]], calls: Sequence[tuple[Call, Passage]]
) -> dict[int, float]:
    """By expert, the sum of squares over the second half of the folds."""
    sums: dict[int, torch.Tensor] = {}
    for own, (_, passage) in zip(rows, calls, strict=True):
        tried = passage.folds % 2 == 1
        for expert, values in own.items():
            squares = values.reshape(passage.samples, -1).square().sum(dim=1, dtype=torch.float64)
            sums[expert] = sums.get(expert, 0) + (squares * tried).sum()
    return {expert: float(total) for expert, total in sums.items()}
