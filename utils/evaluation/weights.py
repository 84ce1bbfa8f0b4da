"""The tensors of candidates by the names that their models have for them: read from a checkpoint, or merged as asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from utils.errors import UserError
from utils.evaluation.side_by_side import NOT_FINITE
from utils.merging.merged_tensors import MergeWork, merged_tensors
from utils.merging.pieces.cuts import KnownCuts
from utils.models.stored_layout import StoredLayout
from utils.models.weight_source import WeightSource
from utils.runtime import available_bytes, return_freed_memory

_ALIGNMENT = 64  # bytes; of whatever torch allocates on the CPU
_SHARE = 8  # of the memory that is free, for tensors that are made at a time


@dataclass(frozen=True)
class MergedModel:
    """A recipe's model that is never written: the prepared merge, and which of its tensors each parameter is made of."""

    work: MergeWork = field(repr=False)
    layout: StoredLayout = field(repr=False)
    dtype: torch.dtype

    def outputs(self, names: Sequence[str]) -> tuple[str, ...]:
        """The merge's tensors that some parameters and stored buffers are made of, each once."""
        return tuple(dict.fromkeys(header.name for name in names for header in self.layout.headers(name)))


class CandidateWeights:
    """The weights of several candidates; `WeightsOfMany` of `utils/evaluation/side_by_side.py`."""

    def __init__(
        self, sources: Sequence[WeightSource | MergedModel], device: torch.device, known: KnownCuts | None = None
    ) -> None:
        """Take each candidate's source, the device that the tensors are wanted on, and cuts that were found before."""
        self.sources, self.device, self.known = list(sources), device, known
        self.models_at_once = models_at_once(device)

    def fetch(self, models: Sequence[int], names: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor] | UserError]:
        """The named tensors of each of some candidates; in place of them the error, where a merge is not finite."""
        found: dict[int, dict[str, torch.Tensor] | UserError] = {}
        alike: dict[tuple[str, ...], list[int]] = {}  # candidates that are asked for the same tensors of their merges
        wanted = dict(zip(models, names, strict=True))
        for model in models:
            source = self.sources[model]
            if isinstance(source, MergedModel):
                alike.setdefault(source.outputs(wanted[model]), []).append(model)
            else:
                found[model] = {name: _aligned(tensor) for name, tensor in source.fetch(list(wanted[model])).items()}
        for outputs, group in alike.items():
            merged = self._merged(group, outputs)
            for place, model in enumerate(group):
                made, merged[place] = merged[place], None  # so that only one model's is there in two dtypes
                found[model] = made if isinstance(made, UserError) else self._named(model, wanted[model], made)
        return [found[model] for model in models]

    def _merged(self, models: Sequence[int], outputs: Sequence[str]) -> list[dict[str, torch.Tensor] | UserError]:
        try:
            works = [self.sources[model].work for model in models]
            on_cpu = self.device.type == "cpu"  # elsewhere a tensor is copied first, while it is small
            placed = [self.sources[model].dtype for model in models] if on_cpu else None
            return merged_tensors(works, outputs, self.known, placed)
        except UserError as error:
            if NOT_FINITE not in error.codes:
                raise
            if len(models) == 1:
                return [error]
            return [one for model in models for one in self._merged([model], outputs)]

    def _named(self, model: int, names: Sequence[str], merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's tensors by its own names; what transformers would convert while loading is converted. `merged` is used
        up, so that a model is not there twice."""
        layout, dtype = self.sources[model].layout, self.sources[model].dtype
        found = {
            name: self._placed(merged.pop(header.name), dtype)
            for name in names
            if (header := layout.direct.get(name)) is not None and header.name in merged
        }
        conversions = {id(one): one for name in names if (one := layout.conversions.get(name)) is not None}
        for one in conversions.values():  # one after the other: the pieces of a mixture are as large as what they make
            made = one.convert({each.name: self._placed(merged.pop(each.name), dtype) for each in one.sources})
            found |= {name: _aligned(value) for name, value in made.items() if name in names}
            del made
            return_freed_memory()
        return found

    def _placed(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=dtype) if tensor.is_floating_point() else tensor.to(self.device)

    def close(self) -> None:
        """Close the checkpoints."""
        for source in self.sources:
            if not isinstance(source, MergedModel):
                source.close()


def models_at_once(device: torch.device) -> Callable[[int], int]:
    """How many candidates' tensors to make at a time, where those of one take so many bytes, as memory is now."""
    available = max(2**28, available_bytes(device) // _SHARE)
    return lambda nbytes: max(1, available // max(1, nbytes))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where torch would have put it: a view of a file begins anywhere, and the last bits of a product by
    several threads depend on where its factors begin."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT else tensor
