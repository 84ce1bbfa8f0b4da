"""The files of saliency vectors that a planned merge reads: found, checked against the headers, tied to its tensors.

mergekit's graph hands a method the name of the output tensor only. A checkpoint may store that tensor under another
name, and a slice may take it from another layer; the file of vectors knows it by the name it was measured under. So
each task that will read vectors gets, in place of the recipe's path, a `VectorKey` with the absolute path and that
name; one that will not, no path.

A recipe is made of certain files, and another expert's or a later measurement's have the same names and lengths. So the
manifest beside the recipe has the hash of each, and a file of another is refused. Of a large file (Gram matrices, as large
as the model) only the header is hashed, which holds digests of the entries; each of those is checked when it is read.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import Problem, UserError, raise_collected
from utils.mergekit_api import GatherTensors, ModelReference
from utils.merging.guided.own_method import SALIENCY, OwnMethod
from utils.merging.inputs import MergeInput
from utils.merging.parameters import input_values
from utils.merging.plan import MergePlan, OutputTensor, gathered, shortened
from utils.merging.recipe_file import MergeRecipe
from utils.models.headers import FLOAT_DTYPES
from utils.named_paths import without_folders
from utils.recipes.recipe_manifest import refuse_other_files
from utils.recipes.saliency_vectors import SaliencyVectors, VectorKey, open_vectors

_NO_VECTORS = ""
_WITHOUT_VECTORS = "give it saliency '' (merged without vectors) or weight 0 by a filter"


@dataclass(frozen=True)
class SaliencyFile:
    """One file of vectors: the path as the recipe has it, where that is, and what was in it.

    `sha256` is its `content_hash`; `recorded` says whether that is what the recipe's manifest has. `tensors` counts, by the
    label of each model that uses the file, the tensors that are merged by it. `powers` are the exponents of the squared
    gradients there; None among them where one is not known.
    """

    written: str
    path: Path
    nbytes: int
    sha256: str
    tensors: Mapping[str, int]
    recorded: bool = False
    powers: frozenset[float | None] = frozenset()

    @property
    def label(self) -> str:
        """A publishable name: as written, but the last part alone of an absolute path."""
        return without_folders(self.written)


def bind_saliency(
    plan: MergePlan, recipe: MergeRecipe, recorded: Mapping[str, str]
) -> tuple[MergePlan, tuple[SaliencyFile, ...], list[str]]:
    """Check the saliency files that a recipe names, and tie the tasks to their vectors. No weights are read.

    Args:
        plan: the merge.
        recipe: where the files' names come from: they lead to what is here or beside it.
        recorded: the hashes of files by their names in the recipe, as its manifest has them.

    Returns:
        The plan with tied tasks; the files (none for a method without saliency); warnings (sentences).

    Raises:
        UserError: a file is missing, not one of vectors, or another one than was recorded; it lacks those of a tensor that
            is merged by them, or they do not fit it, or are negative or not finite; a vocabulary is aligned, so that its
            rows are not those measured; a parameter is outside the method's range.
    """
    method = plan.method
    if not isinstance(method, OwnMethod):
        return plan, (), []
    raise_collected(shortened(list(_bad_values(plan, method))), "merge recipe: values")
    places = {text: Path(os.path.expanduser(recipe.locate(text))) for text in _named_files(plan)}
    if lost := [text for text, path in places.items() if not path.exists()]:
        raise UserError(
            f"{recipe.where}: saliency names {lost[0]}, which is neither beside the recipe nor in {Path.cwd()}; put it back, "
            "measure again with lewis_importance.py and make the recipe again, or correct the name",
            "vectors-missing",
        )
    named = {text: path.resolve() for text, path in places.items()}
    opened = {path: open_vectors(path) for path in dict.fromkeys(named.values())}
    hashes = {text: opened[path].content_hash() for text, path in named.items()}
    refuse_other_files(recipe.path, {text: (path, hashes[text]) for text, path in named.items()}, recorded)
    problems: list[Problem] = []
    used: dict[str, dict[str, int]] = {text: {} for text in named}
    powers: dict[str, set[float | None]] = {text: set() for text in named}
    tensors = []
    for tensor in plan.tensors:
        keys: dict[ModelReference, VectorKey | str] = {}
        for model in plan.inputs.models:
            values = input_values(tensor, model.reference)
            text = values.get(SALIENCY)
            if not text:
                continue
            dtype, shape = tensor.stored_dtypes[model.reference], _shape(tensor, model)
            if dtype not in FLOAT_DTYPES or not method.reads_vectors(values, len(shape)):
                keys[model.reference] = _NO_VECTORS
                continue
            try:
                keys[model.reference] = _checked_key(plan, tensor, model, opened[named[text]], method)
            except UserError as error:
                problems.append(Problem(str(error), error.code))
            used[text][model.label] = used[text].get(model.label, 0) + 1
            powers[text].add(method.power(opened[named[text]], dict(tensor.task.parameters.items())))
        tensors.append(_tied(tensor, keys))
    raise_collected(shortened(problems), f"merge recipe: {SALIENCY}")
    files = tuple(
        SaliencyFile(
            text, path, path.stat().st_size, hashes[text], used[text], text in recorded, frozenset(powers[text])
        )
        for text, path in named.items()
    )
    return replace(plan, tensors=tuple(tensors)), files, list(_idle_files(files))


def _bad_values(plan: MergePlan, method: OwnMethod) -> Iterator[Problem]:
    """Parameters that the method cannot work with; the same one for many tensors is said of the first."""
    seen: set[str] = set()
    for tensor in plan.tensors:
        shared = dict(tensor.task.parameters.items())
        for model in plan.inputs.models:
            if not (values := input_values(tensor, model.reference)):
                continue
            for text in method.problems(shared, values):
                if text not in seen:
                    seen.add(text)
                    yield Problem(f"{model.label}, {tensor.name}: {text}", "recipe-bad-value")


def _named_files(plan: MergePlan) -> list[str]:
    """Every file that some model names for some tensor, as the recipe has it, in the order of the models."""
    values = (
        input_values(tensor, model.reference).get(SALIENCY) for model in plan.inputs.models for tensor in plan.tensors
    )
    return list(dict.fromkeys(text for text in values if text))


def _checked_key(
    plan: MergePlan, tensor: OutputTensor, model: MergeInput, vectors: SaliencyVectors, method: OwnMethod
) -> VectorKey:
    task = tensor.task
    weight = gathered(task).weight_info[model.reference]
    if not isinstance(task.gather_tensors, GatherTensors):
        raise UserError(
            f"{model.label}, {weight.name}: its vocabulary is aligned, which no vectors follow; {_WITHOUT_VECTORS}",
            "saliency-vocabulary",
        )
    header = tensor.sources.get(model.reference)  # of a head that is tied in this model: the embedding's
    stored = weight.name if header is None else header.name
    planned = {weight.name, plan.architecture.spellings.get(stored, stored)}
    spellings = (name for name, own in plan.architecture.spellings.items() if own in planned)
    found = vectors.of_these(dict.fromkeys((weight.name, stored, *spellings)))
    if not found:
        raise UserError(
            f"{model.label}: {vectors.path} has no vectors of {weight.name}; {_WITHOUT_VECTORS}",
            "saliency-missing-tensor",
        )
    shape = vectors.shape(found[0])
    if tensor.shape is not None and shape != (tensor.shape or (1,)):
        lengths = " and ".join(map(str, shape))
        raise UserError(
            f"{model.label}: {vectors.path} has vectors of length {lengths} for {weight.name}, whose shape is "
            f"{list(tensor.shape)}; were they measured on this model?",
            "saliency-shape",
        )
    if tensor.shape is not None and (misfit := method.misfit(vectors, found[0], tensor.shape)):
        raise UserError(f"{model.label}: {vectors.path}: {misfit}; were they measured on this model?", "grams-misfit")
    vectors.vectors(found[0])
    return VectorKey(vectors.path, found[0])


def _shape(tensor: OutputTensor, model: MergeInput) -> tuple[int, ...]:
    header = tensor.sources.get(model.reference)
    return (tensor.merged_shape or ()) if header is None else header.shape


def _tied(tensor: OutputTensor, keys: Mapping[ModelReference, VectorKey | str]) -> OutputTensor:
    if not keys:
        return tensor
    task = tensor.task
    values = {
        model: {**dict(own.items()), **({SALIENCY: keys[model]} if model in keys else {})}
        for model, own in task.input_parameters.items()
    }
    return replace(tensor, task=type(task)(**{**dict(task), "input_parameters": values}))


def _idle_files(files: tuple[SaliencyFile, ...]) -> Iterator[str]:
    if not files:
        yield f"no model names a file of saliency vectors ({SALIENCY}), so nothing guides this merge"
    for file in files:
        if not file.tensors:
            yield f"the saliency file {file.label} is not used: where it applies, every density is 0 or 1, or every weight 0"
