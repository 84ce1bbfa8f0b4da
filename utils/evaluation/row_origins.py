"""Texts as they are told apart, and the rows of one that the pair config has calibration take."""

import os

from utils.pair.calibration import row_order, with_defaults
from utils.pair.config import PairConfig
from utils.pair.source import CalibrationSource

Origin = tuple[str, str | None, str | None]  # path, subset and split of a text


def origin_of(path: str, subset: str | None, split: str | None) -> Origin:
    """What tells a text from others, however the path of a file is written."""
    here = os.path.expanduser(path)
    return (os.path.realpath(here) if os.path.exists(here) else path, subset, split)


def calibration_rows(config: PairConfig, source: CalibrationSource, count: int) -> set[int]:
    """The rows that calibration takes of a text with so many of them."""
    asked = origin_of(source.path, source.subset, source.split)
    return {
        number
        for each in map(with_defaults, config.texts)
        if origin_of(each.path, each.subset, each.split) == asked
        for number in row_order(each, count)[: config.nsamples]
    }
