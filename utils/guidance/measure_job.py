"""What the *measure* half of a guidance method works on: prepared models, devices, and a way to run over them."""

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.pair.config import ModelEntry, PairConfig
from utils.passes.subjects import EncodedText, Subject
from utils.progress_bar import progress_bar
from utils.runtime import return_freed_memory

if TYPE_CHECKING:
    import torch

    from utils.models.weight_source import WeightSource

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """One piece of work that needs a device to itself.

    `label` is shown beside the progress bar and in messages; `blocks` is how often `do` will call what it is given as
    its second argument, with a block's number.
    """

    label: str
    blocks: int
    do: "Callable[[torch.device, OnBlock], Any]"


@dataclass(frozen=True)
class Measured:
    """What a *measure* half returns: the content of its files by name, what to print, and what to warn of.

    A file too large for memory is a path in the job's `workspace`.
    """

    files: Mapping[str, bytes | Path]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasureJob:
    """Everything a *measure* half needs.

    `devices` are those asked for; each has one piece of work at a time, a single CPU up to `at_once`. `options` are the
    values of the method's own flags. `workspace` is where the *measure* half may make a folder, on the file system of
    the results, for files that are too large for memory; what it does not hand over is removed. `quiet`: no progress.
    """

    config: PairConfig
    subjects: tuple[Subject, ...]
    devices: "tuple[torch.device, ...]"
    options: Mapping[str, Any]
    trust_remote_code: bool
    at_once: int = 1
    workspace: Path | None = None
    quiet: bool = False

    @property
    def base(self) -> Subject:
        """The base model."""
        return self.subject(self.config.base)

    @property
    def experts(self) -> tuple[Subject, ...]:
        """The experts, in the order of the config."""
        return tuple(self.subject(entry) for entry in self.config.experts)

    def subject(self, entry: ModelEntry) -> Subject:
        """The prepared model of an entry."""
        return next(subject for subject in self.subjects if subject.entry == entry)

    def text(self, subject: Subject, expert: Subject) -> EncodedText:
        """The text of `expert`, in the tokens of `subject`."""
        return subject.texts[self.config.text_of(expert.entry.type)]

    def open_weights(self, subject: Subject, device: "torch.device") -> "WeightSource":
        """A source of a model's weights on a device; close it in the end (`run_blocks` does)."""
        from utils.models.weight_source import ResidentWeights, StreamedWeights

        if subject.headers is None:
            return ResidentWeights(subject.checkpoint, device, subject.dtype, self.trust_remote_code)
        return StreamedWeights(subject.headers, device, subject.dtype)

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Do all pieces of work with one progress bar, side by side where `devices` and `at_once` say; results in order.

        Raises:
            UserError: what the work raises; a GPU that ran out of memory.
        """
        lanes = (self.devices if len(self.devices) > 1 else self.devices * self.at_once)[: len(works)]
        if len(lanes) > len(self.devices) and not self.quiet:
            print(f"side by side: {len(lanes)} models at a time share the threads", flush=True)
        free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
        for device in lanes:
            free.put(device)
        given_up = threading.Event()
        total = sum(work.blocks for work in works)
        with progress_bar("measuring", total, "block", quiet=self.quiet) as bar, _shared_threads(lanes):

            def on_block(layer: int) -> None:
                return_freed_memory()  # else the freed temporaries of block after block pile up
                bar.update()
                if given_up.is_set():
                    raise concurrent.futures.CancelledError

            def do(work: Work) -> Any:
                device = free.get()
                bar.set_postfix_str(work.label)
                try:
                    return _within_memory(work, device, on_block)
                finally:
                    free.put(device)

            if len(lanes) <= 1:
                return [do(work) for work in works]
            with concurrent.futures.ThreadPoolExecutor(len(lanes), thread_name_prefix="measure") as pool:
                try:
                    return list(pool.map(do, works))
                except BaseException:
                    given_up.set()
                    pool.shutdown(cancel_futures=True)
                    raise


@contextlib.contextmanager
def _shared_threads(lanes: "Sequence[torch.device]") -> Iterator[None]:
    """Share torch's threads among works on the CPU, which start meanwhile."""
    import torch

    before = torch.get_num_threads()
    if lanes and lanes[0].type == "cpu":
        torch.set_num_threads(max(1, before // len(lanes)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _within_memory(work: Work, device: "torch.device", on_block: OnBlock) -> Any:
    import torch

    # a model's own kernels may be written for the current GPU, which is another one where several measure side by side
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with current:
            return work.do(device, on_block)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"{work.label}: the GPU ran out of memory; lower --micro_batch_tokens, nsamples or seqlen, or use "
            "--device cpu",
            "device-out-of-memory",
        ) from error
