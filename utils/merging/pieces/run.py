"""Merge what `utils/merging/pieces/choice.py` chose, on all cores at once: read, compute and write in pieces.

Each thread lets torch use one core. torch's own threads would all have to wait for each other after every one of some
thirty short steps a piece, and would not read or write. Beside a few MB of buffers a thread, nothing is held but the
tables of the tensors that are being counted.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mergekit.common import dtype_from_name
from mergekit.graph import Executor, TaskUniverse

from utils.merging.pieces.arithmetic import Scratch
from utils.merging.pieces.choice import DirectTensor, Division
from utils.merging.pieces.finiteness import is_finite, not_finite
from utils.merging.pieces.tensor import TensorMerge
from utils.merging.pieces.work_line import WorkLine
from utils.merging.plan import MergePlan, OutputTensor
from utils.models.shard_files import ShardFiles, TensorSpec
from utils.models.tensor_files import TensorFiles, as_bytes
from utils.runtime import one_torch_thread

READ_AHEAD = 512 * 2**20  # bytes that the system is asked to read before their turn

Report = Callable[[str, int], None]


def run_directly(
    plan: MergePlan, division: Division, folder: Path, shard_bytes: int, threads: int, report: Report
) -> None:
    """Merge all tensors of a plan into safetensors files in `folder`, those left to mergekit first.

    Args:
        plan: the planned merge.
        division: which of its tensors are merged here.
        folder: where the files go; it exists.
        shard_bytes: most bytes of a file, 0 for one file.
        threads: how many to use.
        report: told, from this thread, the name of a tensor that is being written and how many bytes more of it are.

    Raises:
        UserError: a merged tensor is not finite, an input changed, or writing failed.
    """
    # the order in which mergekit finishes, and so fills files (but for recipes that use an input tensor twice)
    in_order = sorted(plan.tensors, key=lambda tensor: tensor.task.group_label() or "")
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in in_order]
    place = {spec.name: number for number, spec in enumerate(specs)}
    with ShardFiles(folder, specs, shard_bytes) as output:
        _merge_by_mergekit(plan, [tensor for tensor, _ in division.left], output, report)
        direct = sorted(division.direct, key=lambda tensor: place[tensor.name])
        merge_directly(direct, output, threads, report)


def merge_directly(tensors: Sequence[DirectTensor], output: ShardFiles, threads: int, report: Report) -> None:
    """Merge tensors into open files, begun in the order given; arguments and errors as `run_directly`."""
    progress = _Progress()
    with TensorFiles(header.file for tensor in tensors for header in tensor.headers) as inputs, one_torch_thread():
        ahead = _ReadAhead(tensors, inputs)

        def meanwhile() -> None:
            read, written = progress.collect()
            ahead.advance(read)
            for name, nbytes in written.items():
                report(name, nbytes)

        jobs = (TensorMerge(tensor, inputs, output, partial(progress.add, tensor.name)) for tensor in tensors)
        WorkLine(jobs, Scratch).run(threads, meanwhile)


def _merge_by_mergekit(plan: MergePlan, tensors: Sequence[OutputTensor], output: ShardFiles, report: Report) -> None:
    universe = TaskUniverse()
    targets = {universe.add_task(tensor.task): tensor for tensor in tensors}
    if not targets:
        return
    known = {}
    if plan.vocabulary.task is not None:  # built while planning, so not again
        known[universe.add_task(plan.vocabulary.task)] = plan.vocabulary.info
    by_name = {tensor.name: tensor for tensor in tensors}
    for task, value in Executor(list(targets), cached_values=known).run(quiet=True):
        tensor = by_name[task.output_weight.name]
        value = value.to(dtype_from_name(tensor.dtype)).contiguous()
        if not is_finite(value):
            raise not_finite(tensor.name)
        output.write(tensor.name, 0, as_bytes(value.view(-1)))
        report(tensor.name, value.nbytes)


class _Progress:
    """Bytes read for the first time, and bytes written by tensor, since they were last asked for."""

    def __init__(self) -> None:
        self._read, self._written = 0, {}
        self._lock = threading.Lock()

    def add(self, name: str, read: int, written: int) -> None:
        with self._lock:
            self._read += read
            if written:
                self._written[name] = self._written.get(name, 0) + written

    def collect(self) -> tuple[int, dict[str, int]]:
        with self._lock:
            found = self._read, self._written
            self._read, self._written = 0, {}
        return found


class _ReadAhead:
    """Asks the system for inputs some way ahead of the work."""

    def __init__(self, tensors: Sequence[DirectTensor], inputs: TensorFiles) -> None:
        self._inputs = inputs
        self._waiting = (header for tensor in tensors for header in tensor.headers)
        self._asked = self._read = 0

    def advance(self, read: int) -> None:
        self._read += read
        while self._asked < self._read + READ_AHEAD and (header := next(self._waiting, None)) is not None:
            self._inputs.read_ahead(header)
            self._asked += header.nbytes
