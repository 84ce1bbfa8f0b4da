"""Carry out a planned merge: in pieces where that gives the same bits, else by mergekit's executor; one progress bar.

In the latter case the tasks are mergekit's own, in its own order, so that the tensors equal those of stock mergekit with
the same seed bit for bit. Only the writer differs, it looks at every tensor on its way to the disk; and entries are
selected by magnitude without sorting (`utils/merging/fast_sparsifiers.py`), unless that is switched off.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import set_seed

from utils.errors import UserError, warn
from utils.mergekit_api import (
    Executor,
    FinalizeModel,
    MultiGPUExecutor,
    SaveTensor,
    TaskUniverse,
    TensorWriter,
    TensorWriterTask,
)
from utils.merging.fast_sparsifiers import selecting_exactly
from utils.merging.method_memory import AT_ONCE
from utils.merging.pieces.arithmetic import is_finite, not_finite
from utils.merging.pieces.finished import FinishedTensors
from utils.merging.pieces.run import misfit, run_directly
from utils.merging.plan import MergePlan, forget_inputs
from utils.merging.planning import PlannedMerge
from utils.merging.settings import MergeSettings
from utils.merging.stacked_outputs import Stacking, WrittenTensor, written_tensors
from utils.models.headers import INDEX, TensorHeader, read_headers
from utils.models.shard_files import change_of
from utils.progress_bar import progress_bar
from utils.publishing.checksums import file_checksum
from utils.runtime import gigabytes, give_back_what_is_freed


class CheckedWriter(TensorWriter):
    """mergekit's shard writer; refuses tensors that are not finite, puts slices into their stacks, counts what it takes."""

    def __init__(self, folder: Path, settings: MergeSettings, progress: tqdm, plan: MergePlan) -> None:
        super().__init__(
            str(folder),
            max_shard_size=settings.out_shard_size,
            use_async=settings.async_write,
            max_write_threads=settings.write_threads,
        )
        self.taken: set[str] = set()
        self._stacking, self._counting = Stacking(plan), threading.Lock()
        self._show = partial(_show, progress, {}, len(written_tensors(plan)))

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Check one tensor and hand it on.

        Raises:
            UserError: it holds a NaN or an infinity.
        """
        if not is_finite(tensor):
            raise not_finite(name)
        for whole, value in self._stacking.add(name, tensor):
            super().save_tensor(whole, value, clone)
        with self._counting:  # several GPUs write from threads of their own
            self.taken.add(name)
            self._show(self._stacking.places.name_of(name), tensor.nbytes)

    def abandon(self) -> None:
        """Wait for shards that are being written and drop the others, so that their folder can be removed."""
        if self.use_async:
            self._executor.shutdown(wait=True, cancel_futures=True)


class CheckedWriterTask(TensorWriterTask, arbitrary_types_allowed=True):
    """The task that gives mergekit's saving tasks our writer."""

    writer: CheckedWriter

    def execute(self, **_kwargs) -> TensorWriter:
        """Return the writer."""
        return self.writer


def run_merge(planned: PlannedMerge, folder: Path, finished: FinishedTensors | None = None) -> None:
    """Merge all tensors of a plan into safetensors shards in `folder`.

    Args:
        planned: the planned merge.
        folder: where the shards go; it exists.
        finished: what an earlier run has finished there; takes down what is finished now, where tensors are merged in
            pieces. mergekit's executor fills files in its own order: it begins anew unless all were finished.

    Raises:
        UserError: a merged tensor is not finite, memory or disk ran out, or an input changed under way.
    """
    plan, settings, division = planned.plan, planned.settings, planned.division
    finished, tensors = finished or FinishedTensors(None, ""), written_tensors(plan)
    forget_inputs(plan.options, plan.inputs)
    if finished.sums and (damage := _damage(planned, folder, finished.sums)):
        finished.forget(damage)
        for path in (folder / INDEX, *folder.glob("*.safetensors")):
            path.unlink(missing_ok=True)
    if finished.damage:
        warn([f"what an interrupted run had finished is not as it was left ({finished.damage}): all is merged again"])
    if not settings.quiet:
        anew = "" if division.direct else "; after a kill the merge begins anew"
        print(f"path: {division.summary}{anew}", flush=True)
        if finished.sums:
            done = sum(tensor.nbytes for tensor in tensors if tensor.name in finished.sums)
            print(f"resumed: {len(finished.sums)} of {len(tensors)} tensors ({gigabytes(done)}) are there", flush=True)
    with selecting_exactly(division.by_counting):
        if not division.direct:
            if not finished.sums.keys() >= {tensor.name for tensor in tensors}:
                _run_by_mergekit(plan, settings, planned.device, folder)
                finished.add_all(_sums(folder, tensors))
            return
        with _progress_bar(plan, settings) as progress, _readable_failures(plan):
            shown = partial(_show, progress, {}, len(tensors))
            run_directly(plan, division, folder, settings.out_shard_size, torch.get_num_threads(), shown, finished)
    forget_inputs(plan.options, plan.inputs)


def _sums(folder: Path, tensors: Sequence[WrittenTensor]) -> dict[str, int]:
    """Checksums of tensors that lie in a folder, 0 for those that are optional and not there."""
    there = read_headers(folder, "what was merged")
    return {
        tensor.name: file_checksum(*_place(there[tensor.name])) if tensor.name in there else 0 for tensor in tensors
    }


def _place(header: TensorHeader) -> tuple[Path, int, int]:
    return header.file, header.start, header.nbytes


def _damage(planned: PlannedMerge, folder: Path, sums: Mapping[str, int]) -> str:
    """What of the weights that an earlier run has finished is not as it was left, as a clause; "" if nothing is."""
    if planned.division.direct:
        return misfit(planned.plan, folder, planned.settings.out_shard_size, sums)
    if links := [path.name for path in folder.glob("*.safetensors") if path.is_symlink()]:
        return f"{links[0]} is not a regular file"
    try:
        there = read_headers(folder, "what was finished")
    except UserError:
        return "its weight files are cut or missing"
    absent = [
        tensor.name for tensor in written_tensors(planned.plan) if tensor.name not in there and not tensor.optional
    ]
    if absent:
        return f"{absent[0]} is missing"
    return next(filter(None, (change_of(name, sums.get(name), _place(header)) for name, header in there.items())), "")


def _run_by_mergekit(plan: MergePlan, settings: MergeSettings, device: str, folder: Path) -> None:
    # torch's generators, numpy's and Python's, as mergekit does; only now, so that no check before has drawn from them
    set_seed(settings.random_seed)
    if plan.method.spec.name not in AT_ONCE:  # small pieces that come again and again would cost page faults each time
        give_back_what_is_freed()
    with _progress_bar(plan, settings) as progress:
        writer = CheckedWriter(folder, settings, progress, plan)
        try:
            with _readable_failures(plan):
                _execute(plan, settings, device, writer)
        finally:
            writer.abandon()
            forget_inputs(plan.options, plan.inputs)
    absent = {tensor.name for tensor in plan.tensors if not tensor.weight.optional} - writer.taken
    if absent:  # cannot happen with one executor; threads of several GPUs have lost results before
        raise RuntimeError(f"mergekit finished without writing {', '.join(sorted(absent)[:5])}")


def _execute(plan: MergePlan, settings: MergeSettings, device: str, writer: CheckedWriter) -> None:
    writer_task = CheckedWriterTask(out_path=writer.out_path, max_shard_size=settings.out_shard_size, writer=writer)
    saves = [
        SaveTensor(
            tensor_name=tensor.name,
            tensor_task=tensor.task,
            writer_task=writer_task,
            clone=settings.clone_tensors,
            optional=tensor.weight.optional,
            dtype=tensor.dtype,
        )
        for tensor in plan.tensors
    ]
    targets = [*saves, FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=writer_task)]
    if plan.vocabulary.task is not None:
        targets.append(plan.vocabulary.task)
    if settings.multi_gpu:
        executor = MultiGPUExecutor(targets, storage_device=None if settings.low_cpu_memory else "cpu")
        results = executor.run(quiet=True)
    else:
        universe = TaskUniverse(targets)
        handles = [universe.add_task(target) for target in targets]
        known = {}
        if plan.vocabulary.task is not None:  # built while planning, so not again
            known[universe.add_task(plan.vocabulary.task)] = plan.vocabulary.info
        executor = Executor(handles, device, device if settings.low_cpu_memory else "cpu", cached_values=known)
        results = executor.run(quiet=True)
    for _ in results:
        pass


def _show(progress: tqdm, seen: dict[str, None], tensors: int, name: str, nbytes: int) -> None:
    """Move the progress bar by more bytes of a tensor."""
    seen[name] = None
    progress.set_postfix_str(f"tensor {len(seen)} of {tensors}", refresh=False)
    progress.update(nbytes)


def _progress_bar(plan: MergePlan, settings: MergeSettings) -> tqdm:
    return progress_bar("merging", plan.nbytes, "B", quiet=settings.quiet, unit_scale=True)


@contextlib.contextmanager
def _readable_failures(plan: MergePlan) -> Iterator[None]:
    """Turn the failures a user can do something about into `UserError`."""
    try:
        yield
    except FileNotFoundError as error:  # so says safetensors whatever kept it from opening a file, without a number
        files = [file for model in plan.inputs.models for file in model.checkpoint.files]
        if error.errno is not None:
            raise
        gone = next((file for file in files if not file.exists()), None)
        what = f"{gone} is gone" if gone else "a weight file exists, but cannot be opened; are too many files open?"
        raise UserError(f"reading weights failed: {what}", "merge-weights-io") from error
    except SafetensorError as error:
        text = str(error)
        remedy = "make room, or choose another --output_path" if "os error 28" in text else "is an input incomplete?"
        raise UserError(f"reading or writing weights failed: {text}; {remedy}", "merge-weights-io") from error
    except torch.OutOfMemoryError as error:
        free = gigabytes(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else "little"
        first = str(error).splitlines()[0]
        raise UserError(
            f"the GPU ran out of memory ({free} free): {first} Use --device cpu, or a GPU that nothing else uses",
            "memory-gpu",
        ) from error
    except RuntimeError as error:
        if not str(error).startswith(("unable to open file", "unable to mmap")):  # torch's words when it maps a file
            raise
        raise UserError(f"reading weights failed: {error}; can the file be read?", "merge-weights-io") from error
    except MemoryError as error:
        raise UserError(
            "memory ran out; give a smaller --out_shard_size, or dtype: bfloat16 in the recipe", "memory-host"
        ) from error
