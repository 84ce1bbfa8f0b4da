"""Which planned tensors are merged here rather than by mergekit's executor, and what has to be computed for each.

Merged here are the methods that select by magnitude or not at all (`ties`, `breadcrumbs`, `breadcrumbs_ties`,
`task_arithmetic`) and `linear`, on the CPU, where every step of mergekit's can be done in pieces with the same bits. Methods
that draw numbers (`dare_*`, `della*`) are not: one stream of random numbers runs through all tensors of a recipe.

What is computed here is what mergekit's own code does in the version it was compared with. `REPLACED` holds a digest of
that code; with any other, nothing is merged here.
"""

import hashlib
import inspect
import math
from dataclasses import dataclass
from functools import cache, reduce

import torch

from utils.mergekit_api import (
    ConsensusMethod,
    GatherTensors,
    GeneralizedTaskArithmeticMerge,
    MergeMethod,
    ModelReference,
    PermutedVocabulary,
    SparsificationMethod,
    dtype_from_name,
    linear_merge,
    replaceable_code,
)
from utils.merging.pieces.arithmetic import MOST_CHANGES, Average, Combination
from utils.merging.plan import MergePlan, OutputTensor, gathered
from utils.merging.settings import MergeSettings
from utils.models.headers import FLOAT_DTYPES, TensorHeader, first_rows

# Of the functions of mergekit 0.1.5 listed in `utils/mergekit_api.py`. To accept another version: compare those functions,
# run the tests of these modules with the new digest, then put it here.
REPLACED = frozenset({"d73e0170faa276937197a0842a00e17ac806a8a4d4f6ef087530e5d37011437b"})
# by the code that headers have; in float64 nothing is merged here
TORCH_DTYPES = {code: getattr(torch, name) for code, name in FLOAT_DTYPES.items() if name != "float64"}
_BANDS = (None, SparsificationMethod.magnitude, SparsificationMethod.magnitude_outliers)


@dataclass(frozen=True)
class Band:
    """Of a change, the `keep` entries of largest magnitude after the `skip` largest of all."""

    skip: int
    keep: int


@dataclass(frozen=True)
class DirectTensor:
    """One tensor to merge here.

    `headers` are the inputs, the base first if there is one. `rule` is a combination of changes, with the band of each
    change that is kept (None: all of it); or, for an average, its coefficients, with `normalize`.
    """

    name: str
    headers: tuple[TensorHeader, ...]
    dtype: torch.dtype
    out_dtype: torch.dtype
    rule: Combination | Average
    bands: tuple[Band | None, ...]

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.headers[0].shape)


@dataclass(frozen=True)
class Division:
    """A plan's tensors: those merged here, and those left to mergekit, with the reason for each of these.

    `by_counting`: of the latter, mergekit's executor selects entries by counting in place of its sorting
    (`utils/merging/fast_sparsifiers.py`).
    """

    direct: tuple[DirectTensor, ...]
    left: tuple[tuple[OutputTensor, str], ...]
    by_counting: bool

    @property
    def summary(self) -> str:
        """What is done where, and why, as a clause."""
        total = len(self.direct) + len(self.left)
        reasons = ", ".join(dict.fromkeys(reason for _, reason in self.left))
        text = f"{len(self.direct)} of {total} tensors by exact selection in pieces, without mergekit's sorting"
        if not self.direct:
            text = f"all tensors by mergekit: {reasons}"
        elif self.left:
            text += f"; {len(self.left)} by mergekit ({reasons})"
        cut = any(_is_cut(tensor) for tensor, _ in self.left)
        return f"{text}; mergekit's executor selects by counting, without sorting" if self.by_counting and cut else text


def divide(plan: MergePlan, settings: MergeSettings) -> Division:
    """Divide a plan's tensors between this project and mergekit."""
    method = plan.method
    by_magnitude = getattr(method, "sparsification_method", None) in _BANDS[1:]
    by_counting = settings.fast_selection and by_magnitude and _is_known(method) and unknown_code(method) is None
    against = reason_against(settings, method)
    if against is None and (plan.options.device != "cpu" or settings.multi_gpu):
        against = "merging in pieces is for the CPU"
    if against is None and any(tensor.shape is None or tensor.dtype is None for tensor in plan.tensors):
        against = "some tensors are converted while loading or are not floating-point numbers"
    if against is None and len({tensor.name for tensor in plan.tensors}) < len(plan.tensors):
        against = "the recipe makes a tensor twice"
    direct, left = [], []
    for tensor in plan.tensors:
        found = _direct(tensor, method, plan.vocabulary.cuts_only) if against is None else against
        if isinstance(found, str):
            left.append((tensor, found))
        else:
            direct.append(found)
    return Division(tuple(direct), tuple(left), by_counting)


def reason_against(settings: MergeSettings, method: MergeMethod) -> str | None:
    """Why nothing is merged here by a method, whatever the tensors and the device, as a clause; None if it may be."""
    if not settings.fast_selection:
        return "--fast_selection is off"
    return _unsuitable_method(method) or unknown_code(method)


def unknown_code(method: MergeMethod) -> str | None:
    """Why none of mergekit's code for a method may be replaced, as a clause; None if it is the code compared with."""
    if (digest := replaced_code()) in REPLACED:
        return None
    return f"this mergekit computes {method.spec.name} by other code than the one compared with ({digest[:12]})"


@cache
def replaced_code() -> str:
    """A digest of the code of mergekit's that is not run for tensors merged here; "unreadable" without its source.

    It is also what `utils/merging/fast_sparsifiers.py` relies on. To be asked for the first time while nothing is replaced.
    """
    try:
        text = "\n".join(inspect.getsource(part) for part in replaceable_code())
    except (OSError, TypeError, AttributeError):
        return "unreadable"
    return hashlib.sha256(text.encode()).hexdigest()


def _unsuitable_method(method: MergeMethod) -> str | None:
    name = method.spec.name
    if method is linear_merge:
        return None
    if not _is_known(method) or method.consensus_method == ConsensusMethod.count:
        return f"{name} has no faster way here"
    if method.sparsification_method not in _BANDS:
        return f"{name} draws random numbers, in mergekit's order"
    return None


def _is_known(method: MergeMethod) -> bool:
    return type(method) is GeneralizedTaskArithmeticMerge


def _is_cut(tensor: OutputTensor) -> bool:
    return any(values.get("density", 1.0) < 1 for _, values in tensor.task.input_parameters.items())


def _direct(tensor: OutputTensor, method: MergeMethod, cuts_only: bool) -> DirectTensor | str:
    task = tensor.task
    is_cut = type(task.gather_tensors) is PermutedVocabulary and cuts_only and tensor.vocabulary_axis == 0
    if type(task.gather_tensors) is not GatherTensors and not is_cut:
        return "vocabularies are aligned"
    if task.dtype is not None or task.out_dtype is not None:
        return "a dtype of its own"
    models = [model for model in task.model_order if model in tensor.sources]
    if method is not linear_merge:
        changed = [model for model in models if model != task.base_model]
        if task.base_model not in models or not changed:
            return "the base or every changed model lacks it"
        models = [task.base_model, *changed]
    headers = tuple(tensor.sources[model] for model in models)
    if is_cut:
        rows = tensor.shape[0]
        if any(header.change is not None or header.shape[0] < rows for header in headers):
            return "vocabularies are aligned"
        if len({header.dtype for header in headers}) > 1:
            return "vocabularies of several dtypes are aligned"
        headers = tuple(first_rows(header, rows) for header in headers)
    if not headers or any(header.shape != tensor.shape for header in headers) or not math.prod(tensor.shape):
        return "unusual shapes"
    dtype = _working_dtype(tensor, models)
    if isinstance(dtype, str):
        return dtype
    values = [task.input_parameters[model] for model in models]
    shared = dict(task.parameters.items())
    out_dtype = dtype_from_name(tensor.dtype)
    if method is linear_merge:
        rule = Average(tuple(float(one["weight"]) for one in values), bool(shared["normalize"]))
        return DirectTensor(tensor.name, headers, dtype, out_dtype, rule, ())
    values = values[1:]
    select = method.sparsification_method
    bands = tuple(kept_band(select, tensor.params, one["density"], one.get("gamma", 0.0)) for one in values)
    if shared["rescale"] and any(bands):
        return "rescale: true takes norms of whole tensors"
    if len(values) > MOST_CHANGES:
        return f"more than {MOST_CHANGES} changed models"
    rule = Combination(
        weights=tuple(float(one["weight"]) for one in values),
        vote=method.consensus_method is not None,
        normalize=bool(shared["normalize"]),
        scale=float(shared["lambda"]),
        dtype=dtype,
    )
    return DirectTensor(tensor.name, headers, dtype, out_dtype, rule, bands)


def _working_dtype(tensor: OutputTensor, models: list[ModelReference]) -> torch.dtype | str:
    """What mergekit computes in: the dtypes loaded, promoted. A reason if a value would be rounded twice on the way."""
    gather = gathered(tensor.task)
    loaded = []
    for model in models:
        stored = tensor.sources[model].dtype
        if stored not in TORCH_DTYPES:
            return f"inputs in {stored}"
        asked = gather.weight_info[model].force_dtype or gather.dtype
        loaded.append((TORCH_DTYPES[stored], dtype_from_name(asked) if asked else None))
    dtype = reduce(torch.promote_types, [asked or stored for stored, asked in loaded])
    if any(asked not in (None, stored, dtype) for stored, asked in loaded):
        return "inputs are loaded in several dtypes"
    if dtype not in TORCH_DTYPES.values() or dtype_from_name(tensor.dtype) not in TORCH_DTYPES.values():
        return f"computed in {dtype}, saved in {tensor.dtype}"
    return dtype


def kept_band(method: SparsificationMethod | None, numel: int, density: float, gamma: float = 0.0) -> Band | None:
    """The entries that mergekit keeps of a change with `numel` entries, by rank; None for all of them."""
    if method is None or density >= 1:
        return None
    if method == SparsificationMethod.magnitude:
        return Band(0, max(1, int(density * numel)) if density > 0 else 0)
    keep = int(density * numel)
    return Band(min(numel - keep, int(gamma * numel)), keep)
