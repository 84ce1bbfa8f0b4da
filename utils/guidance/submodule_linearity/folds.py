"""Folds of a text: its samples in a fixed number of groups, whose Gram matrices are kept apart.

The folds say how sure a weight is (`utils/guidance/submodule_linearity/intervals.py`), and half of them which level a
block is best weighed at (`utils/guidance/submodule_linearity/level_fit.py`).
"""

from collections.abc import Sequence

from utils.pair.batches import MicroBatch

FOLDS = 30  # one sample each where no more are measured on than the method's authors take


def sample_folds(batches: Sequence[MicroBatch]) -> list[list[int]]:
    """The fold of each sample of a text, by micro-batch; the same whatever the size of the micro-batches."""
    found, first = [], 0
    for batch in batches:
        samples = len(batch.lengths)
        found.append([sample % FOLDS for sample in range(first, first + samples)])
        first += samples
    return found


def fold_tokens(batches: Sequence[MicroBatch]) -> list[int]:
    """Real tokens in each fold of a text; 0 in folds that have no sample."""
    tokens = [0] * FOLDS
    for batch, folds in zip(batches, sample_folds(batches), strict=True):
        for fold, length in zip(folds, batch.lengths, strict=True):
            tokens[fold] += length
    return tokens
