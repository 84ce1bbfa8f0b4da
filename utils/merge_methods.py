"""Merge methods of this project's own, registered with mergekit in the process that merges.

mergekit has no entry points: a recipe with one of these methods needs this project's `utils/merger.py` (or a program
that calls `register_methods`), and stock `mergekit-yaml` does not know it.

`guided_ties` is mergekit's `ties`, but a model may name a file of saliency vectors (`utils/saliency_vectors.py`), and
then the entries kept of its changes are those of largest saliency instead of largest magnitude. Everything after the
selection is done by mergekit's own `ties` (or, without the vote, `task_arithmetic`): what is left out of a change is
put back to the base before that method sees it, and that method keeps all.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor, where

from utils.errors import UserError
from utils.saliency_mask import kept_entries, magnitude_mask, saliency_mask
from utils.saliency_vectors import VectorKey, read_vectors

GUIDED_TIES = "guided_ties"
SALIENCY = "saliency"


class GuidedTies(GroupMergeMethod):
    """The method `guided_ties`.

    A class because mergekit's shorter form has no room for a parameter called `lambda`.

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
        int8_mask: dtype of the sign mask, as `ties`; changes no result.

    Dtype and roundings are mergekit's: changes are taken in the working dtype, saliencies ranked in float32. Of equal
    ranks the lowest index is kept.
    """

    spec = MergeMethodSpec(
        name=GUIDED_TIES,
        pretty_name="TIES guided by saliency",
        reference_url="https://arxiv.org/abs/2306.01708",
        parameters=(
            ParameterSpec("int8_mask", bool, ParameterScope.SHARED, default=False),
            ParameterSpec("normalize", bool, ParameterScope.SHARED, default=True),
            ParameterSpec("vote", bool, ParameterScope.SHARED, default=True),
            ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0),
            ParameterSpec("weight", float, ParameterScope.NON_BASE),
            ParameterSpec("density", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec(SALIENCY, str, ParameterScope.NON_BASE, default=""),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor of the base and the other models; all in one dtype and on one device.

        Raises:
            UserError: a file of vectors cannot be read or does not fit. (Command 3 has checked that before.)
        """
        base = group.base
        if base is None:
            raise ValueError(f"{GUIDED_TIES} needs a base for {group.metadata.name}")
        shared = {name: parameters[name] for name in ("normalize", "lambda", "int8_mask")}
        entries = tuple(
            entry if entry is base else _trimmed(entry, base.tensor, group.metadata.name, parameters)
            for entry in group.entries
        )
        rest = merge_methods.get("ties" if parameters["vote"] else "task_arithmetic")
        assert isinstance(rest, GroupMergeMethod)
        return rest.merge_group(
            replace(group, entries=entries),
            weight=parameters["weight"],
            density=dict.fromkeys(parameters["density"], 1.0),
            rescale=False,
            **shared,
        )


def register_methods() -> None:
    """Make the methods known to mergekit; once more does nothing.

    Raises:
        UserError: mergekit has another method of that name.
    """
    try:
        known = merge_methods.get(GUIDED_TIES)
    except RuntimeError:
        merge_methods.register(GuidedTies())
        return
    if not is_own(known):
        raise UserError(
            f"another package has registered a merge method {GUIDED_TIES} with mergekit; remove that package"
        )


def is_own(method: MergeMethod) -> bool:
    """Whether a method is this project's rather than mergekit's."""
    return isinstance(method, GuidedTies)


def _trimmed(entry: TensorEntry, base: Tensor, name: str | None, parameters: Mapping[str, Any]) -> TensorEntry:
    """A model's tensor, equal to the base wherever its change is not kept."""
    density, source = parameters["density"][entry.id], parameters[SALIENCY][entry.id]
    k = kept_entries(base.numel(), density)
    if k == base.numel():
        return entry
    if not k:
        return replace(entry, tensor=base)
    change = entry.tensor - base
    mask = _by_saliency(change, k, source, name) if source else magnitude_mask(change, k)
    del change  # before another tensor of that size is made
    return replace(entry, tensor=where(mask, entry.tensor, base))


def _by_saliency(change: Tensor, k: int, source: str | VectorKey, name: str | None) -> Tensor:
    key = source if isinstance(source, VectorKey) else VectorKey(Path(source).expanduser(), name or "")
    axis0, axis1 = read_vectors(key)
    try:
        return saliency_mask(change, k, axis0, axis1)
    except ValueError as error:
        raise UserError(f"saliency file {key.file}: {key.tensor}: {error}") from None
