"""Tensors of a merge that transformers puts together from stored ones while loading: experts apart, merged stacked."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from utils.mergekit_api import ModelReference
from utils.merging.inputs import MergeInputs
from utils.models.headers import FLOAT_CODES
from utils.models.weight_source import build_skeleton


@dataclass(frozen=True)
class Assembled:
    """Such a tensor: its shape, and what each input stores its parts in, as headers call it."""

    shape: tuple[int, ...]
    dtypes: Mapping[ModelReference, str]


class Assembling:
    """What the base's class has under a name; it is built when it is first asked for."""

    def __init__(self, inputs: MergeInputs, *, trust_remote_code: bool) -> None:
        self._inputs, self._trust_remote_code = inputs, trust_remote_code

    def of(self, name: str) -> Assembled | None:
        """The tensor of a name; None if the class has no such parameter."""
        shape = self._shapes.get(name)
        if shape is None:
            return None
        return Assembled(shape, {one.reference: FLOAT_CODES[one.checkpoint.float_dtype] for one in self._inputs.models})

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        model = build_skeleton(self._inputs.donor.checkpoint, torch.float32, self._trust_remote_code)
        return {name: tuple(value.shape) for name, value in model.named_parameters()}
