"""The one door to mergekit: every name of it that this project uses, its private ones and two patches included.

mergekit promises nothing about what lies below its commands, so the project works with the releases that its tests have
run with, and says so at once with any other. Importing this file imports mergekit, which takes seconds: where a command
would start slower by that, it is imported late.
"""

# ruff: noqa: F401 (most of what is imported here is for others)
import contextlib
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from utils.errors import UserError, brief

RELEASES = ("0.1.5",)
REMEDY = "pip install -r requirements.txt"


def check_release() -> None:
    """Raise a `UserError` unless the installed mergekit is one that the tests have run with."""
    try:
        found = metadata.version("mergekit")
    except metadata.PackageNotFoundError as error:
        raise UserError(f"mergekit is not installed: {REMEDY}", "mergekit-missing") from error
    if found not in RELEASES:
        works = " and ".join(RELEASES)
        raise UserError(f"mergekit {found} is installed; this project works with {works}: {REMEDY}", "mergekit-version")


check_release()
try:
    from mergekit import parameter_resolver as _parameter_resolver
    from mergekit import sparsify as _sparsify
    from mergekit.architecture import (
        ModelArchitecture,
        ModuleArchitecture,
        ModuleDefinition,
        WeightInfo,
        arch_info_for_config,
    )
    from mergekit.architecture.auto import get_transformers_info, infer_architecture_info
    from mergekit.architecture.conversion import can_convert_checkpoint_keys
    from mergekit.architecture.json_definitions import JsonModuleArchitecture
    from mergekit.common import ModelPath, ModelReference, dtype_from_name, get_auto_cls, set_config_value
    from mergekit.config import ConditionalParameter, MergeConfiguration
    from mergekit.graph import Executor, TaskUniverse
    from mergekit.io import tasks as _tasks
    from mergekit.io import tensor_writer as _tensor_writer
    from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, SaveTensor, TensorWriterTask
    from mergekit.io.tensor_writer import TensorWriter
    from mergekit.merge import _model_out_config as result_config
    from mergekit.merge import _set_chat_template as set_chat_template
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
    from mergekit.merge_methods import dtype as _dtype_alignment
    from mergekit.merge_methods import generalized_task_arithmetic as _task_arithmetic
    from mergekit.merge_methods import get as merge_method
    from mergekit.merge_methods import linear as _linear
    from mergekit.merge_methods import register as register_merge_method
    from mergekit.merge_methods.base import ParameterSpec
    from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GeneralizedTaskArithmeticMerge
    from mergekit.merge_methods.linear import linear_merge
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.multigpu_executor import MultiGPUExecutor
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, rescaled_masked_tensor
    from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo
    from transformers import PreTrainedTokenizerFast as _FastTokenizer
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] not in ("mergekit", "transformers"):
        raise
    works = " and ".join(RELEASES)
    raise UserError(
        f"the installed mergekit {metadata.version('mergekit')} and transformers {metadata.version('transformers')} lack "
        f"what this project uses ({brief(error)}); it works with mergekit {works}: {REMEDY}",
        "mergekit-version",
    ) from error

Sparsifier = Callable[..., Any]


def replaceable_code() -> Iterator[object]:
    """The parts of mergekit's code that this project does not run where it merges in pieces or selects by counting."""
    yield GeneralizedTaskArithmeticMerge
    yield _task_arithmetic.get_mask
    yield from (_sparsify.sparsify, _sparsify.magnitude, _sparsify.magnitude_outliers, rescaled_masked_tensor)
    yield _linear
    yield from (ExecuteMergeMethodTask, GroupMergeMethod, MergeMethod._execute_resolved)
    yield _dtype_alignment
    yield from (_tasks.LoadTensor, GatherTensors, SaveTensor, _tensor_writer.TensorWriter, PermutedVocabulary)


class _Sparsifiers:
    """Puts functions in the place of mergekit's two sparsifiers by magnitude, for as long as some context wants that.

    `mergekit.sparsify.sparsify` looks both up in its module, so they are replaced there, for all threads. Contexts may
    overlap: the first one's functions stay until the last has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._originals = (_sparsify.magnitude, _sparsify.magnitude_outliers)

    @contextlib.contextmanager
    def replaced(
        self, magnitude: Callable[[Sparsifier], Sparsifier], outliers: Callable[[Sparsifier], Sparsifier]
    ) -> Iterator[None]:
        """Replace both while the context lasts; each new function is made of the one it replaces."""
        with self._lock:
            if not self._wanted:
                self._originals = (_sparsify.magnitude, _sparsify.magnitude_outliers)
                _sparsify.magnitude = magnitude(_sparsify.magnitude)
                _sparsify.magnitude_outliers = outliers(_sparsify.magnitude_outliers)
            self._wanted += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted -= 1
                if not self._wanted:
                    _sparsify.magnitude, _sparsify.magnitude_outliers = self._originals


replaced_sparsifiers = _Sparsifiers().replaced


@contextlib.contextmanager
def vocabularies_by_id() -> Iterator[None]:
    """Let transformers' vocabularies be listed by id while mergekit builds a union of them.

    They come out of a hash table whose order differs from process to process, and mergekit gives the tokens that a
    union adds their ids in that order: the same merge would give differently numbered tokens every time.
    """
    listed = _FastTokenizer.get_vocab

    def by_id(tokenizer: _FastTokenizer) -> dict[str, int]:
        return dict(sorted(listed(tokenizer).items(), key=lambda pair: pair[1]))

    _FastTokenizer.get_vocab = by_id
    try:
        yield
    finally:
        _FastTokenizer.get_vocab = listed


@contextlib.contextmanager
def evaluating_settings(made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let another function, made of mergekit's own, find what a parameter's setting says of a tensor."""
    original = _parameter_resolver.evaluate_setting
    _parameter_resolver.evaluate_setting = made(original)
    try:
        yield
    finally:
        _parameter_resolver.evaluate_setting = original
