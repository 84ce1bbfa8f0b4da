"""Where a comparison of models stands between two blocks, as plain data and tensors: for snapshots, which outlive a kill."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from utils.guidance.submodule_linearity.part_changes import PartChanges

Missed = dict[tuple[int, str, int], float]


class Standing(NamedTuple):
    """What has been measured: `parts` of the blocks that are done, `outside` by path what was seen outside of them and in
    which modules there text has been (`entered`), `missed` as in `Compared`."""

    parts: list[PartChanges]
    outside: dict[str, PartChanges]
    entered: set[str]
    missed: Missed


def as_plain(standing: Standing) -> dict[str, Any]:
    """A standing as plain data and tensors."""
    return {
        "parts": [_plain(part) for part in standing.parts],
        "outside": {path: _plain(part) for path, part in standing.outside.items()},
        "entered": sorted(standing.entered),
        "missed": dict(standing.missed),
    }


def from_plain(found: Mapping[str, Any], device: torch.device) -> Standing:
    """The same standing again, its sums on a device."""
    outside = {path: _part(part, device) for path, part in found["outside"].items()}
    parts = [_part(part, device) for part in found["parts"]]
    return Standing(parts, outside, set(found["entered"]), dict(found["missed"]))


def _plain(part: PartChanges) -> dict[str, Any]:
    return {one.name: getattr(part, one.name) for one in fields(part)}


def _part(found: Mapping[str, Any], device: torch.device) -> PartChanges:
    part = PartChanges(**found)
    distances = {expert: sums.to(device) for expert, sums in part.distances.items()}
    return replace(part, sums=part.sums.to(device), distances=distances)
