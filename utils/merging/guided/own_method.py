"""What this project's merge methods have in common: they read files of saliency vectors, one for each model."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.mergekit_api import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from utils.recipes.method_rules import DeltaMethod
from utils.recipes.saliency_vectors import SaliencyVectors, VectorKey

SALIENCY = "saliency"
FACTOR = "factor"


class OwnMethod(GroupMergeMethod):
    """A method that reads vectors. Classes because mergekit's shorter form knows no parameter called `lambda`."""

    @abstractmethod
    def reads_vectors(self, values: Mapping[str, Any], dimensions: int) -> bool:
        """Whether a tensor of a model is merged by its vectors, given the model's parameters for it."""

    def power(self, file: SaliencyVectors, shared: Mapping[str, Any]) -> float | None:
        """The exponent of the squared gradients in what the method does; None where that is not known."""
        return shared.get("power")

    def problems(self, shared: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
        """What the method cannot work with in the shared parameters and in a model's own, as clauses."""
        yield from ()

    def misfit(self, file: SaliencyVectors, tensor: str, shape: tuple[int, ...]) -> str:
        """What else in a file does not fit a tensor of a shape, as a clause; "" if nothing."""
        return ""


class WeighedMethod(OwnMethod):
    """A mean in which each model counts by a share, and which has numbers with a range: those of its `rule`."""

    rule: DeltaMethod

    def reads_vectors(self, values: Mapping[str, Any], dimensions: int) -> bool:
        """Everything that counts at all, but for stacked experts and convolutions, of which no vectors are measured."""
        return values["weight"] > 0 and dimensions <= 2

    def problems(self, shared: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
        """Numbers outside their range."""
        for number in self.rule.numbers:
            if not number.allows(shared[number.name]):
                yield f"{number.name} must be {number.words}, got {shared[number.name]}"
        if not values["weight"] >= 0:
            yield f"weight must be a number of at least 0, got {values['weight']}"

    def require_ranges(self, group: TensorGroup, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError if a parameter of a merge is outside its range."""
        for entry in group.non_base:
            for problem in self.problems(parameters, {"weight": parameters["weight"][entry.id]}):
                raise ValueError(f"{self.rule.name}: {problem}")


def weighed_spec(
    rule: DeltaMethod, pretty_name: str, reference_url: str, switches: Mapping[str, bool] | None = None
) -> MergeMethodSpec:
    """A `WeighedMethod` for mergekit: its numbers and `switches` with their defaults, and what each model has."""
    return MergeMethodSpec(
        name=rule.name,
        pretty_name=pretty_name,
        reference_url=reference_url,
        parameters=(
            *(ParameterSpec(one.name, float, ParameterScope.SHARED, default=one.default) for one in rule.numbers),
            *(ParameterSpec(name, bool, ParameterScope.SHARED, default=on) for name, on in (switches or {}).items()),
            ParameterSpec("weight", float, ParameterScope.NON_BASE),
            ParameterSpec("density", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec(FACTOR, float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec(SALIENCY, str, ParameterScope.NON_BASE),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )


def base_of(group: TensorGroup) -> TensorEntry:
    """The base's tensor of a group. Raises ValueError if there is none."""
    if group.base is None:
        raise ValueError(f"{group.metadata.name} has no base")
    return group.base


def vector_key(source: str | VectorKey, name: str | None) -> VectorKey:
    """Where a tensor's vectors are: as the plan has tied it, else in a file under the tensor's own name."""
    return source if isinstance(source, VectorKey) else VectorKey(Path(source).expanduser(), name or "")
