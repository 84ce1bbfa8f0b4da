"""What this project's merge methods have in common: they read files of saliency vectors, one for each model."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.mergekit_api import GroupMergeMethod, TensorEntry, TensorGroup
from utils.recipes.saliency_vectors import SaliencyVectors, VectorKey

SALIENCY = "saliency"


class OwnMethod(GroupMergeMethod):
    """A method that reads vectors. Classes because mergekit's shorter form has no room for a parameter called `lambda`.

    `summary` says what it is, `use` what is done to a tensor by its vectors; `question` and `effect` say in a model card
    what was; `unused` when a file is read for nothing, `without` what is done without any, `remedy` what to do about a
    tensor whose vectors are not there.
    """

    summary: str
    use: str
    question: str
    effect: str
    unused: str
    without: str
    remedy: str

    @abstractmethod
    def reads_vectors(self, values: Mapping[str, Any], dimensions: int) -> bool:
        """Whether a tensor of a model is merged by its vectors, given the model's parameters for it."""

    def problems(self, shared: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
        """What the method cannot work with in the shared parameters and in a model's own, as clauses."""
        yield from ()

    def misfit(self, file: SaliencyVectors, tensor: str, shape: tuple[int, ...]) -> str:
        """What else in a file does not fit a tensor of a shape, as a clause; "" if nothing."""
        return ""


def base_of(group: TensorGroup) -> TensorEntry:
    """The base's tensor of a group. Raises ValueError if there is none."""
    if group.base is None:
        raise ValueError(f"{group.metadata.name} has no base")
    return group.base


def vector_key(source: str | VectorKey, name: str | None) -> VectorKey:
    """Where a tensor's vectors are: as the plan has tied it, else in a file under the tensor's own name."""
    return source if isinstance(source, VectorKey) else VectorKey(Path(source).expanduser(), name or "")
