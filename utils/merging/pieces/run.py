"""Merge what `utils/merging/pieces/choice.py` chose, on all cores at once: read, compute and write in pieces.

Each thread lets torch use one core. torch's own threads would all have to wait for each other after every one of some
thirty short steps a piece, and would not read or write. Beside a few MB of buffers a thread, nothing is held but the
tables of the tensors that are being counted.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from utils.merging.pieces.arithmetic import Scratch
from utils.merging.pieces.by_mergekit import merge_by_mergekit
from utils.merging.pieces.choice import DirectTensor, Division
from utils.merging.pieces.cuts import KnownCuts
from utils.merging.pieces.finished import FinishedTensors
from utils.merging.pieces.tensor import Output, TensorMerge, inputs_of
from utils.merging.pieces.tensor_cuts import shared_cuts
from utils.merging.pieces.work_line import WorkLine
from utils.merging.plan import MergePlan
from utils.merging.stacked_outputs import StackedOutput, WrittenTensor, written_tensors
from utils.models.shard_files import ShardFiles, TensorSpec
from utils.models.tensor_files import TensorFiles, as_bytes
from utils.selection import one_torch_thread

READ_AHEAD = 512 * 2**20  # bytes that the system is asked to read before their turn

Report = Callable[[str, int], None]


def run_directly(
    plan: MergePlan,
    division: Division,
    folder: Path,
    shard_bytes: int,
    threads: int,
    report: Report,
    finished: FinishedTensors | None = None,
) -> None:
    """Merge all tensors of a plan into safetensors files in `folder`, those left to mergekit first.

    Args:
        plan: the planned merge.
        division: which of its tensors are merged here.
        folder: where the files go; it exists.
        shard_bytes: most bytes of a file, 0 for one file.
        threads: how many to use.
        report: called from this thread with the name of a tensor that is being written, and how many more bytes of it are.
        finished: what a killed run has finished in the folder, which stays; takes down what is finished now.

    Raises:
        UserError: a merged tensor is not finite, an input changed, or writing failed.
    """
    finished = finished or FinishedTensors(None, "")
    in_order = _in_order(plan)
    specs = _specs(in_order)
    place = {one.name: number for number, one in enumerate(one for tensor in in_order for one in tensor.merged)}
    begun = bool(finished.sums)
    with (
        ShardFiles(folder, specs, shard_bytes, begun=begun) as output,
        finished.kept_up(specs, output.sync, output.checksum) as note,
    ):
        stacked = StackedOutput(output, plan)

        def note_and_report(name: str, nbytes: int) -> None:
            note(stacked.places.name_of(name), nbytes)
            report(stacked.places.name_of(name), nbytes)

        for spec in specs:
            if spec.name in finished.sums:
                report(spec.name, spec.nbytes)
        left = [tensor for tensor, _ in division.left if stacked.places.name_of(tensor.name) not in finished.sums]
        for number, value in merge_by_mergekit([(plan, tensor) for tensor in left]):
            stacked.write(left[number].name, 0, as_bytes(value.view(-1)))
            note_and_report(left[number].name, value.nbytes)
        direct = [tensor for tensor in division.direct if stacked.places.name_of(tensor.name) not in finished.sums]
        direct.sort(key=lambda tensor: place[tensor.name])
        merge_directly([(tensor, stacked) for tensor in direct], threads, note_and_report)


def misfit(plan: MergePlan, folder: Path, shard_bytes: int, sums: Mapping[str, int]) -> str:
    """What of the weight files that `run_directly` would go on with is not as it was left, as a clause; "" if nothing is."""
    return ShardFiles(folder, _specs(_in_order(plan)), shard_bytes).misfit(sums)


def _in_order(plan: MergePlan) -> list[WrittenTensor]:
    """The order in which mergekit finishes, and so fills files (but for recipes that use an input tensor twice)."""
    return sorted(written_tensors(plan), key=lambda tensor: tensor.merged[0].task.group_label() or "")


def _specs(tensors: Sequence[WrittenTensor]) -> list[TensorSpec]:
    return [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


def merge_directly(
    work: Sequence[tuple[DirectTensor, Output]], threads: int, report: Report, known: KnownCuts | None = None
) -> None:
    """Merge tensors into outputs, begun in the order given; arguments and errors as `run_directly`.

    What several of the tensors are made of is read once. `known` are cuts of these inputs that were found before; those
    that are found now are added, those that several of the tensors need being searched together.
    """
    progress = _Progress()
    tensors = [tensor for tensor, _ in work]
    together: dict[Hashable, list[tuple[DirectTensor, Output]]] = {}
    for tensor, output in work:
        together.setdefault(inputs_of(tensor), []).append((tensor, output))
    with TensorFiles(header.file for tensor in tensors for header in tensor.headers) as inputs, one_torch_thread():
        if known is not None:
            WorkLine(shared_cuts(tensors, inputs, known), Scratch).run(threads, lambda: None)
        ahead = _ReadAhead([group[0][0] for group in together.values()], inputs)

        def meanwhile() -> None:
            read, written = progress.collect()
            ahead.advance(read)
            for name, nbytes in written.items():
                report(name, nbytes)

        jobs = (TensorMerge(group, inputs, progress.add, known) for group in together.values())
        WorkLine(jobs, Scratch).run(threads, meanwhile)


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
