"""Merge methods of this project's own, registered with mergekit in the process that merges.

mergekit has no entry points: a recipe with one of these methods needs this project's `utils/merger.py` (or a program
that calls `register_methods`), and stock `mergekit-yaml` does not know it. Both take files of saliency vectors
(`utils/recipes/saliency_vectors.py`), one for each model.

`guided_ties` is mergekit's `ties`, but the entries kept of a model's changes are those of largest saliency instead of
largest magnitude. Everything after the selection is done by mergekit's own `ties` (or, without the vote,
`task_arithmetic`): what is left out of a change is put back to the base before that method sees it, and that method
keeps all.

`guided_mean` averages the changes of the models entry by entry, each weighed by a power of its squared gradient
(`utils/merging/guided/mean.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, float32, promote_types, where

from utils.errors import UserError
from utils.mergekit_api import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
    merge_method,
    register_merge_method,
)
from utils.merging.guided.gram_method import GramMean
from utils.merging.guided.mask import kept_entries, magnitude_mask, saliency_mask
from utils.merging.guided.mean import WeighedModel, guided_mean
from utils.merging.guided.own_method import (
    FACTOR,
    SALIENCY,
    OwnMethod,
    WeighedMethod,
    base_of,
    vector_key,
    weighed_spec,
)
from utils.recipes import method_rules
from utils.recipes.saliency_vectors import SaliencyVectors, VectorKey, read_vectors

GUIDED_TIES = method_rules.GUIDED_TIES.name


class GuidedTies(OwnMethod):
    """The method `guided_ties`.

    Parameters, per model that is not the base:
        weight: factor of its change.
        density: share of the entries of its change that are kept, int(density entries), one at least if positive; 1
            leaves the change untouched, 0 leaves it out. Default 1.
        saliency: path of its file of vectors; "" (the default) selects by magnitude, as `ties` does. While merging it
            may be a `VectorKey`, which also says under what name the file knows the tensor.

    Shared:
        normalize: divide by the sum of the weights that agree (default true), as `ties`.
        lambda: factor of the merged change (default 1).
        vote: leave out entries whose sign is not that of the sum (default true); false adds up all.

    Dtype and roundings are mergekit's: changes are taken in the working dtype, saliencies ranked in float32. Of equal
    ranks the lowest index is kept.
    """

    spec = MergeMethodSpec(
        name=GUIDED_TIES,
        pretty_name="TIES guided by saliency",
        reference_url="https://arxiv.org/abs/2306.01708",
        parameters=(
            ParameterSpec("normalize", bool, ParameterScope.SHARED, default=True),
            ParameterSpec("vote", bool, ParameterScope.SHARED, default=True),
            ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0),
            ParameterSpec("weight", float, ParameterScope.NON_BASE),
            ParameterSpec("density", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec(SALIENCY, str, ParameterScope.NON_BASE, default=""),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )

    def power(self, file: SaliencyVectors, shared: Mapping[str, Any]) -> float | None:
        """What the file holds: this method takes its vectors as they are."""
        return file.power

    def reads_vectors(self, values: Mapping[str, Any], dimensions: int) -> bool:
        """Matrices of which a part is kept. What else a density cuts (a bias that shares a filter) is cut by magnitude."""
        return 0 < values["density"] < 1 and dimensions == 2

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor of the base and the other models; all in one dtype and on one device.

        Raises:
            UserError: a file of vectors cannot be read or does not fit. (Command 3 has checked that before.)
        """
        base = base_of(group)
        shared = {name: parameters[name] for name in ("normalize", "lambda")}
        entries = tuple(
            entry if entry is base else _trimmed(entry, base.tensor, group.metadata.name, parameters)
            for entry in group.entries
        )
        rest = merge_method("ties" if parameters["vote"] else "task_arithmetic")
        assert isinstance(rest, GroupMergeMethod)
        return rest.merge_group(
            replace(group, entries=entries),
            weight=parameters["weight"],
            density=dict.fromkeys(parameters["density"], 1.0),
            rescale=False,
            int8_mask=False,
            **shared,
        )


class GuidedMean(WeighedMethod):
    """The method `guided_mean`: `utils/merging/guided/mean.py` has the formula. One model to merge is enough.

    Parameters, per model that is not the base:
        weight: its share beside the others', at least 0; only ratios matter. Of a model with 0 nothing is read.
        density: share of the entries of its change that are kept, as in `guided_ties`; those that are not kept still
            weigh what their squared gradients say, for the base. Default 1.
        factor: of its change alone, not of its share beside the others'; any number. Default 1.
        saliency: path of its file of vectors, which must be given; "" lets all its entries count alike (by magnitude
            where a density cuts). While merging it may be a `VectorKey`.

    Shared:
        lambda: factor of the merged change (default 1).
        power: exponent of the squared gradients, above 0, at most 1 (default 0.5).
        floor: at least 0; the larger, the nearer entries that matter to nobody stay to the base (default 0.1).

    Computed in float32 and rounded once. Entries to keep are ranked by delta^2 F^power.
    """

    rule = method_rules.GUIDED_MEAN
    spec = weighed_spec(rule, "Mean guided by saliency", "https://arxiv.org/abs/2111.09832")

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor of the base and the other models; all on one device.

        Raises:
            ValueError: a parameter is outside its range. (Command 3 has checked that, and the files, before.)
            UserError: a file of vectors cannot be read or does not fit.
        """
        base, name = base_of(group), group.metadata.name
        self.require_ranges(group, parameters)
        models = [self._weighed(entry, base.tensor, name, parameters) for entry in group.non_base]
        numbers = {key: parameters[key] for key in ("power", "floor")}
        try:
            return guided_mean(base.tensor, models, scale=parameters["lambda"], **numbers)
        except ValueError as error:
            raise UserError(f"{name}: {error}", "saliency-shape") from error

    def _weighed(
        self, entry: TensorEntry, base: Tensor, name: str | None, parameters: Mapping[str, Any]
    ) -> WeighedModel:
        weight, source = parameters["weight"][entry.id], parameters[SALIENCY][entry.id]
        if not weight:
            return WeighedModel(entry.tensor, 0.0, None)
        axes = read_vectors(vector_key(source, name)) if source else None
        one = WeighedModel(entry.tensor, weight, axes, factor=parameters[FACTOR][entry.id])
        k = kept_entries(base.numel(), parameters["density"][entry.id])
        if k == base.numel():
            return one
        if not k:
            return replace(one, tensor=base)
        exact = promote_types(base.dtype, float32)
        change = entry.tensor.to(exact) - base.to(exact)
        if axes is None:
            return replace(one, kept=magnitude_mask(change, k))
        powers = [axis.double().pow(parameters["power"]) for axis in axes]
        return replace(one, kept=_by_saliency(change, k, powers, vector_key(source, name)))


def register_methods() -> None:
    """Make the methods known to mergekit; once more does nothing.

    Raises:
        UserError: mergekit has another method of that name.
    """
    for method in (GuidedTies, GuidedMean, GramMean):
        name = method.spec.name
        try:
            known = merge_method(name)
        except RuntimeError:
            register_merge_method(method())
            continue
        if not isinstance(known, method):
            raise UserError(
                f"another package has registered a merge method {name} with mergekit; remove that package",
                "recipe-method-taken",
            )


def _trimmed(entry: TensorEntry, base: Tensor, name: str | None, parameters: Mapping[str, Any]) -> TensorEntry:
    """A model's tensor, equal to the base wherever its change is not kept."""
    density, source = parameters["density"][entry.id], parameters[SALIENCY][entry.id]
    k = kept_entries(base.numel(), density)
    if k == base.numel():
        return entry
    if not k:
        return replace(entry, tensor=base)
    change = entry.tensor - base
    if source:
        key = vector_key(source, name)
        mask = _by_saliency(change, k, read_vectors(key), key)
    else:
        mask = magnitude_mask(change, k)
    del change  # before another tensor of that size is made
    return replace(entry, tensor=where(mask, entry.tensor, base))


def _by_saliency(change: Tensor, k: int, axes: "tuple[Tensor, ...] | list[Tensor]", key: VectorKey) -> Tensor:
    try:
        return saliency_mask(change, k, *axes)
    except ValueError as error:
        raise UserError(f"saliency file {key.file}: {key.tensor}: {error}", "saliency-shape") from error
