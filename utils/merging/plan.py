"""The merge as mergekit plans it, tensor by tensor, with what the headers say about each. No weights are read.

mergekit's planner makes the tasks; this module adds the shapes and dtypes that the result will have, and proves that
every input tensor a task reads is there and fits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.errors import Problem, UserError, raise_collected
from utils.mergekit_api import (
    ExecuteMergeMethodTask,
    GatherTensors,
    LoaderCache,
    MergeMethod,
    MergeOptions,
    MergePlanner,
    ModelReference,
    SaveTensor,
    WeightInfo,
    evaluating_settings,
    result_config,
    set_config_value,
)
from utils.merging.assembled import Assembled, Assembling
from utils.merging.changed_tensors import ChangedTensors
from utils.merging.filter_lookup import by_lookup
from utils.merging.inputs import MergeInputs
from utils.merging.settings import MergeSettings
from utils.merging.slices import refuse_missing_layers, refuse_unlike_blocks
from utils.merging.vocabulary import VocabularyPlan
from utils.models.headers import DTYPE_BYTES, FLOAT_CODES, FLOAT_DTYPES, TensorHeader
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.planned_tensors import ArchitecturePlan, PlannedTensor

_TORCH_BYTES = {name: DTYPE_BYTES[code] for name, code in FLOAT_CODES.items()}
_SHOWN = 5


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result.

    `shape` is None if transformers converts the stored tensors while loading, so that no header tells; `assembled` then
    says what can be known. `dtype` is torch's name, None for what the inputs have (integer buffers). `sources` are the
    headers by input.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    vocabulary_axis: int | None
    task: ExecuteMergeMethodTask = field(repr=False)
    weight: WeightInfo = field(repr=False)
    sources: Mapping[ModelReference, TensorHeader] = field(repr=False)
    assembled: Assembled | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in the result; the inputs' where the shape is unknown."""
        if self.assembled is not None:
            own = self.dtype and _TORCH_BYTES[self.dtype]
            return self.params * (own or max(DTYPE_BYTES[code] for code in self.assembled.dtypes.values()))
        if self.shape is None or self.dtype is None:
            return max((header.nbytes for header in self.sources.values()), default=0)
        return math.prod(self.shape) * _TORCH_BYTES[self.dtype]

    @property
    def merged_shape(self) -> tuple[int, ...] | None:
        """The shape that is merged: of what transformers puts together, the class's; None if unknown."""
        return self.shape if self.assembled is None else self.assembled.shape

    @property
    def params(self) -> int:
        """Number of entries, 0 if unknown."""
        return math.prod(self.merged_shape) if self.merged_shape is not None else 0

    @property
    def stored_dtypes(self) -> Mapping[ModelReference, str]:
        """What each input stores, as headers call it."""
        if self.assembled is not None:
            return self.assembled.dtypes
        return {model: header.dtype for model, header in self.sources.items()}


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do. `config` is the result's, `inputs.config` the recipe as mergekit gets it."""

    inputs: MergeInputs
    architecture: ArchitecturePlan
    vocabulary: VocabularyPlan
    method: MergeMethod
    tensors: tuple[OutputTensor, ...] = field(repr=False)
    config: Any = field(repr=False)
    options: MergeOptions
    dtype: str | None
    out_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def params(self) -> int:
        """Parameters of the result."""
        return sum(tensor.params for tensor in self.tensors)


def plan_merge(
    inputs: MergeInputs,
    architecture: ArchitecturePlan,
    vocabulary: VocabularyPlan,
    method: MergeMethod,
    settings: MergeSettings,
    device: str,
) -> MergePlan:
    """Plan the merge.

    Raises:
        UserError: parameters are missing, inputs do not suit the method, or tensors are absent or do not fit together.
    """
    options = merge_options(settings, device)
    recipe = inputs.config
    planned = recipe if vocabulary.task else recipe.model_copy(update={"tokenizer_source": None, "tokenizer": None})
    planned = planned.model_copy(deep=True)  # the planner rewrites it
    forget_inputs(options, inputs)
    refuse_missing_layers(inputs, settings.trust_remote_code)
    config = result_config(planned, architecture.info, trust_remote_code=settings.trust_remote_code)
    refuse_unlike_blocks(planned, architecture, config)
    try:
        with quiet_mergekit(), evaluating_settings(by_lookup):
            # nothing is written: the folder is that of mergekit's own writer, whose place ours takes
            targets = MergePlanner(planned, architecture.info, options, config).plan_to_disk(out_path="")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"merge recipe: {error}", "recipe-not-mergekits") from error
    by_name = {tensor.name: tensor for tensor in architecture.tensors}
    out_dtype = recipe.out_dtype or recipe.dtype
    problems: list[Problem] = []
    tensors, assembled = [], Assembling(inputs, trust_remote_code=settings.trust_remote_code)
    for task in (target.tensor_task for target in targets if isinstance(target, SaveTensor)):
        info, sources = task.output_weight, {}
        for reference, weight in gathered(task).weight_info.items():
            header = _source(inputs, reference, weight, by_name.get(info.name), problems)
            if header is not None:
                sources[reference] = header
        shape = _shape(inputs, info, sources, vocabulary, settings, problems)
        dtype = info.force_dtype or _out_dtype(out_dtype, inputs, sources)
        whole = None if sources or info.optional else assembled.of(info.name)
        tensors.append(OutputTensor(info.name, shape, dtype, info.vocabulary_axis, task, info, sources, whole))
    raise_collected(shortened(problems, "tensors"), "the models do not fit together")
    _adopt_truncation(config, architecture, tensors, vocabulary, settings)
    shown = (out_dtype or inputs.donor.checkpoint.float_dtype).removeprefix("torch.")
    dtype = recipe.dtype.removeprefix("torch.") if recipe.dtype else None
    return MergePlan(inputs, architecture, vocabulary, method, tuple(tensors), config, options, dtype, shown)


def merge_options(settings: MergeSettings, device: str) -> MergeOptions:
    """The settings as mergekit's options, for the device chosen. mergekit writes no card: ours says more."""
    return MergeOptions(
        allow_crimes=settings.allow_crimes,
        unsafe_truncate_embeddings=settings.unsafe_truncate_embeddings,
        device=device,
        low_cpu_memory=settings.low_cpu_memory,
        out_shard_size=settings.out_shard_size,
        copy_tokenizer=settings.copy_tokenizer,
        clone_tensors=settings.clone_tensors,
        trust_remote_code=settings.trust_remote_code,
        random_seed=settings.random_seed,
        lazy_unpickle=settings.lazy_unpickle,
        write_model_card=False,
        quiet=True,
        read_to_gpu=settings.read_to_gpu,
        multi_gpu=settings.multi_gpu,
        async_write=settings.async_write,
        write_threads=settings.write_threads,
    )


def forget_inputs(options: MergeOptions, inputs: MergeInputs) -> None:
    """Empty mergekit's cache of open checkpoints: it outlives a merge and does not notice rewritten files."""
    LoaderCache().flush_all()
    LoaderCache().loaders.clear()
    set_up_loading(options, inputs)


def set_up_loading(options: MergeOptions, inputs: MergeInputs) -> None:
    """Have mergekit load tensors in this thread by these options; changed tensors and slices through this project."""
    LoaderCache().setup(options)
    for model in inputs.models:
        if model.checkpoint.adapter is not None or model.checkpoint.stacks:
            LoaderCache().loaders[model.reference] = ChangedTensors(model.checkpoint)


def gathered(task: ExecuteMergeMethodTask) -> GatherTensors:
    """The task below alignment or truncation that collects one tensor from every input."""
    source = task.gather_tensors
    while not isinstance(source, GatherTensors):
        source = source.gather_tensors
    return source


def _source(
    inputs: MergeInputs,
    reference: ModelReference,
    weight: WeightInfo,
    known: PlannedTensor | None,
    problems: list[Problem],
) -> TensorHeader | None:
    checkpoint = next(model.checkpoint for model in inputs.models if model.reference == reference)
    tensor = PlannedTensor(weight.name, weight.optional, tuple(weight.aliases or ()), tuple(weight.tied_names or ()))
    stored = tensor.stored_name(checkpoint.tensors)
    if stored is not None:
        return checkpoint.tensors[stored]
    # plan_architecture has already found that it is there after conversion, or optional, for every layer it knows
    if known is None and not weight.optional:
        problems.append(Problem(f"{weight.name} is not in {checkpoint.name}", "merge-tensor-missing"))
    return None


def _shape(
    inputs: MergeInputs,
    weight: WeightInfo,
    sources: Mapping[ModelReference, TensorHeader],
    vocabulary: VocabularyPlan,
    settings: MergeSettings,
    problems: list[Problem],
) -> tuple[int, ...] | None:
    """The shape of the merged tensor; a mismatch that nothing settles is added to the problems."""
    shapes = {reference: header.shape for reference, header in sources.items()}
    if not shapes:
        return None
    axis = weight.vocabulary_axis
    first = next(iter(shapes.values()))
    alike = all(shape == first for shape in shapes.values())
    if axis is not None and (vocabulary.task or settings.unsafe_truncate_embeddings):
        others = {shape[:axis] + shape[axis + 1 :] for shape in shapes.values()}
        if len(others) == 1:
            rows = vocabulary.size if vocabulary.task else min(shape[axis] for shape in shapes.values())
            return (*first[:axis], rows, *first[axis + 1 :])
        alike = False
    if not alike:
        listed = ", ".join(f"{inputs.label(reference)} {list(shape)}" for reference, shape in shapes.items())
        remedy = ""
        if axis is not None and not vocabulary.task and len({len(shape) for shape in shapes.values()}) == 1:
            remedy = "; the vocabularies differ: add tokenizer_source: union (or base) to the recipe"
        problems.append(Problem(f"{weight.name} has different shapes: {listed}{remedy}", "merge-shapes"))
    return first


def _out_dtype(asked: str | None, inputs: MergeInputs, sources: Mapping[ModelReference, TensorHeader]) -> str | None:
    """The recipe's dtype; without one the donor's own, tensor by tensor, and None for integers."""
    if asked:
        return asked.removeprefix("torch.")
    header = sources.get(inputs.donor.reference) or next(iter(sources.values()), None)
    return FLOAT_DTYPES.get(header.dtype) if header else None


def _adopt_truncation(
    config: Any,
    architecture: ArchitecturePlan,
    tensors: list[OutputTensor],
    vocabulary: VocabularyPlan,
    settings: MergeSettings,
) -> None:
    """Truncated embeddings need their new size in the config, where mergekit leaves the old one."""
    if not settings.unsafe_truncate_embeddings or vocabulary.task:
        return
    rows = {t.shape[t.vocabulary_axis] for t in tensors if t.vocabulary_axis is not None and t.shape is not None}
    if len(rows) == 1:
        set_config_value(config, architecture.info.vocab_size_config_key or "vocab_size", rows.pop())


def shortened(problems: Sequence[Problem], what: str = "") -> list[Problem]:
    """The first few problems, and how many more (`what`) there are."""
    more = len(problems) - _SHOWN
    last = [Problem(f"and {more} more{' ' if what else ''}{what}", problems[-1].code)] if more > 0 else []
    return [*problems[:_SHOWN], *last]
