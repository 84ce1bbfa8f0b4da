"""The merge method `gram_mean`: each part of a model where the experts' own outputs agree best.

| part | merged by |
|---|---|
| linear layers whose inputs were measured | `utils/merging/guided/gram.py`, with the guided mean as anchor |
| embeddings and heads whose gradients were | `utils/merging/guided/row_gram.py` |
| norms, biases and what is left | `utils/merging/guided/mean.py` |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.mergekit_api import TensorGroup
from utils.merging.guided.gram import AT_ONCE as SOLVED_AT_ONCE
from utils.merging.guided.gram import InputChange, gram_mean
from utils.merging.guided.low_rank import low_rank_factors, rank_of
from utils.merging.guided.mask import kept_entries, magnitude_mask, saliency_mask
from utils.merging.guided.mean import TEMPORARIES, WeighedModel, guided_mean
from utils.merging.guided.own_method import FACTOR, SALIENCY, WeighedMethod, base_of, vector_key, weighed_spec
from utils.merging.guided.refit import refit_bytes, refitted
from utils.merging.guided.row_gram import AT_ONCE as ROWS_AT_ONCE
from utils.merging.guided.row_gram import RowChange, row_gram_mean
from utils.merging.guided.support import joint_support, search_bytes
from utils.recipes import method_rules
from utils.recipes.gram_file import LayerInputs, input_gram, misfit, row_gram
from utils.recipes.saliency_vectors import SaliencyVectors, VectorKey, read_vectors

_SWITCHES = {"embedding_rows": True, "low_rank": False, "joint_support": False, "anchor": True}


class GramMean(WeighedMethod):
    """The method `gram_mean`. One model to merge gives that model.

    Parameters, per model that is not the base:
        weight: its share beside the others', at least 0; only ratios matter. Of a model with 0 nothing is read.
        density: share of the entries of its change to a linear layer that are kept, fitted anew to answer like the whole
            change on the layer's inputs (`utils/merging/guided/refit.py`); where there are no inputs those of largest
            delta^2 F^power, as they are. Vectors, such as its bias, stay whole. Default 1.
        factor: of its change alone, not of its share beside the others'; any number. Default 1.
        saliency: path of its file of vectors and Gram matrices (`utils/recipes/gram_file.py`), which must be given. A
            tensor for which some model has "", or no matrices, is merged by the guided mean.

    Shared:
        lambda: factor of the merged change (default 1).
        ridge: above 0; pull of directions without inputs to the anchor (default 1e-5).
        anchor: the guided mean (default true); false takes no change at all, as the ridge of a plain regression does.
        off_diagonal: factor on what inputs have in common with each other, 0 to 1 (default 1).
        embedding_rows: merge embeddings and heads row by row (default true); false takes the guided mean.
        power, floor: of the guided mean, as there.
        refit_ridge: above 0; pull of the entries that are kept to what they were, or of a change of low rank to the one
            nearest to the whole (default 1e-3).
        low_rank: a density below 1 keeps, instead of entries, as many numbers in two factors: the change of that rank which
            answers most like the whole (`utils/merging/guided/low_rank.py`; by magnitude where there are no inputs).
            Default false.
        joint_support: the entries that a density keeps are those that answer most like the whole once they are fitted
            (`utils/merging/guided/support.py`), an output counting by its F^power. Default false, those of largest
            delta^2 F^power: recipes from before the search name no support, and are merged as they were.

    Matrices are solved in float64, on a GPU too; the result is rounded once.
    """

    rule = method_rules.GRAM_MEAN
    spec = weighed_spec(rule, "Mean guided by inputs", "https://arxiv.org/abs/2212.09849", _SWITCHES)

    def misfit(self, file: SaliencyVectors, tensor: str, shape: tuple[int, ...]) -> str:
        """Gram matrices of another number of channels."""
        return misfit(file, tensor, shape)

    @staticmethod
    def arithmetic_bytes(
        shape: tuple[int, ...], models: int, *, is_vocabulary: bool, density: float = 1.0, device: str = "cpu"
    ) -> int:
        """Bytes that a tensor's arithmetic takes at its peak beside the inputs, the result included.

        The base, every change and what is merged are there in float64 at once, of a linear layer its anchor, too; and the
        matrices of its width w: float32 and float64 of every model, their sum, its copy and its factor. Pieces of rows are
        solved for with a few temporaries. Where a density cuts, one change after the other takes a search and a fit.

        Args:
            shape: of the tensor.
            models: how many change it.
            is_vocabulary: whether it is an embedding or a head.
            density: the largest that cuts one of the changes; 1: none.
            device: the type of the one that it is merged on.
        """
        entries, squared = torch.Size(shape).numel(), shape[-1] ** 2 if len(shape) == 2 else 0
        held = 8 * (models + 2) * entries
        if is_vocabulary:
            of_a_piece = 3 if models == 2 else 6 + models
            return held + 8 * of_a_piece * min(entries, ROWS_AT_ONCE)
        if not squared:
            return held + min(TEMPORARIES, 56 * entries)
        solving = (12 * models + 8) * squared + 24 * min(entries, SOLVED_AT_ONCE)
        merging = held + 8 * entries + max((12 * models + 24) * squared, solving)
        if not 0 < density < 1:
            return merging
        searching = 4 * squared + search_bytes(shape)
        fitting = 9 * entries + 12 * squared + refit_bytes(shape, density, device)
        return max(merging, 8 * (models + 1) * entries + max(searching, fitting))

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor of the base and the other models; all on one device.

        Raises:
            ValueError: a parameter is outside its range. (Command 3 has checked that, and the headers, before.)
            UserError: a file cannot be read or does not fit.
        """
        base, name = base_of(group).tensor, group.metadata.name
        self.require_ranges(group, parameters)
        models = []
        for entry in group.non_base:
            weight, density, factor, source = (
                parameters[one][entry.id] for one in ("weight", "density", FACTOR, SALIENCY)
            )
            if weight:
                key = vector_key(source, name) if source else None
                models.append(_Model(entry.tensor, weight, density, factor, key))
        try:
            return _merged(base, models, parameters, name or "")
        except ValueError as error:
            raise UserError(f"{name}: {error}", "grams-misfit") from error


@dataclass(frozen=True)
class _Model:
    """A model that counts, and where its vectors and matrices are; None lets its entries count alike."""

    tensor: Tensor
    weight: float
    density: float
    factor: float
    key: VectorKey | None


def _merged(base: Tensor, models: Sequence[_Model], shared: Mapping[str, Any], name: str) -> Tensor:
    if not models or not base.numel():
        return base.clone()
    exact, place = base.double() if _has_double(base) else base.cpu().double(), base.device
    changes = [
        _kept(one.tensor.to(exact.device, torch.float64) - exact, one, shared).mul_(one.factor) for one in models
    ]
    change = changes[0] if len(models) == 1 else _change(exact, models, changes, shared, name)
    del changes  # in an embedding each takes as much as the result four times
    return change.mul_(shared["lambda"]).add_(exact).to(base.dtype).to(place)


def _kept(change: Tensor, model: _Model, shared: Mapping[str, Any]) -> Tensor:
    """What a density leaves of a change; all of a vector, for a bias is hit by the filter of its weight."""
    if change.dim() < 2:
        return change
    k = kept_entries(change.numel(), model.density)
    if k == change.numel():
        return change
    if shared["low_rank"] and change.dim() == 2 and k:
        return _of_low_rank(change, model, shared["refit_ridge"])
    if model.key is None:
        return torch.where(magnitude_mask(change, k), change, 0.0)
    axes, inputs = [axis.double().pow(shared["power"]) for axis in read_vectors(model.key)], input_gram(model.key)
    if inputs is None:
        return torch.where(saliency_mask(change, k, *axes), change, 0.0)
    gram, ridge, turned = inputs.gram, shared["refit_ridge"], inputs.axis == 0
    rows = change.t() if turned else change
    if shared["joint_support"]:
        mask = joint_support(rows, k, gram, axes[1 if turned else 0], ridge)
    else:
        mask = saliency_mask(change, k, *axes)
        mask = mask.t() if turned else mask
    fitted = refitted(rows, mask, gram, ridge)
    return fitted.t() if turned else fitted


def _of_low_rank(change: Tensor, model: _Model, ridge: float) -> Tensor:
    """The change of the rank that a density asks for, whichever way the weight is stored."""
    inputs, rank = None if model.key is None else input_gram(model.key), rank_of(tuple(change.shape), model.density)
    turned = inputs is not None and inputs.axis == 0
    left, right = low_rank_factors(change.t() if turned else change, rank, inputs and inputs.gram, ridge)
    return (left @ right).t() if turned else left @ right


def _change(
    exact: Tensor, models: Sequence[_Model], changes: Sequence[Tensor], shared: Mapping[str, Any], name: str
) -> Tensor:
    if exact.dim() == 2:
        if shared["embedding_rows"] and None not in (grams := _all(models, row_gram)):
            rows = [read_vectors(one.key)[0] for one in models]
            parts = zip(changes, models, rows, grams, strict=True)
            return row_gram_mean([RowChange(change, one.weight, row, gram) for change, one, row, gram in parts])
        if None not in (inputs := _all(models, input_gram)):
            return _linear(models, changes, inputs, shared, name)
    return _guided(changes, models, shared)


def _all(models: Sequence[_Model], read: Any) -> list:
    """What a file has for each model, up to the first that has nothing."""
    found: list = []
    for one in models:
        found.append(None if one.key is None else read(one.key))
        if found[-1] is None:
            break
    return found


def _linear(
    models: Sequence[_Model],
    changes: Sequence[Tensor],
    inputs: Sequence[LayerInputs],
    shared: Mapping[str, Any],
    name: str,
) -> Tensor:
    """As [out, in], whichever way the weight is stored."""
    turned = inputs[0].axis == 0
    anchor = _guided(changes, models, shared) if shared["anchor"] else torch.zeros_like(changes[0])
    if turned:
        anchor, changes = anchor.t(), [change.t() for change in changes]
    experts = [
        InputChange(change, one.weight, given.gram) for change, one, given in zip(changes, models, inputs, strict=True)
    ]
    merged = gram_mean(experts, anchor, ridge=shared["ridge"], off_diagonal=shared["off_diagonal"], label=name)
    return merged.t() if turned else merged


def _guided(changes: Sequence[Tensor], models: Sequence[_Model], shared: Mapping[str, Any]) -> Tensor:
    """The guided mean of the changes, as changes of nothing."""
    weighed = [
        WeighedModel(change, one.weight, read_vectors(one.key) if one.key else None)
        for change, one in zip(changes, models, strict=True)
    ]
    nothing = changes[0].new_zeros(()).expand(changes[0].shape)
    return guided_mean(nothing, weighed, power=shared["power"], floor=shared["floor"])


def _has_double(tensor: Tensor) -> bool:
    return tensor.device.type in ("cpu", "cuda")
