"""What the *measure* half of a guidance method works on: prepared models, devices, and a way to run over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.pair.config import ModelEntry, PairConfig
from utils.passes.subjects import EncodedText, Subject
from utils.progress_bar import progress_bar
from utils.runtime import available_bytes
from utils.workers.local import LocalWorkers
from utils.workers.piece import Piece, Workers

if TYPE_CHECKING:
    import torch

    from utils.models.weight_source import WeightSource


ROUTING = "routing.csv"  # what any guidance may measure of a mixture (`utils/guidance/routing.py`)
TOKENS = "expert_tokens.csv"  # and this (`utils/guidance/expert_tokens.py`)


@dataclass(frozen=True)
class Measured:
    """What a *measure* half returns: the content of its files by name, what to print, and what to warn of.

    A file too large for memory is one that a piece wrote, as a path in the job's `workspace`. `routing` are rows of the
    table of routers, `expert_tokens` of that of experts' tokens, none of models that are no mixtures.
    """

    files: Mapping[str, bytes | Path]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    routing: tuple[tuple, ...] = ()
    expert_tokens: tuple[tuple, ...] = ()


@dataclass(frozen=True)
class MeasureJob:
    """Everything a *measure* half needs.

    `devices` are those asked for; each has one piece of work at a time, a single CPU up to `at_once`. `options` are the
    values of the method's own flags. `workspace` is the folder of the pieces' results, on the file system of what is
    published; what is not handed over is removed. `quiet`: no progress. `workers` do the pieces in the place of `devices`.
    `shares` is how many pieces share the threads of a CPU (`LocalWorkers`), None: as many as go side by side.
    `batches_a_piece` is how many micro-batches a piece takes at most, where sums can be split by them; None: all.
    """

    config: PairConfig
    subjects: tuple[Subject, ...]
    devices: "tuple[torch.device, ...]"
    options: Mapping[str, Any]
    trust_remote_code: bool
    at_once: int = 1
    workspace: Path | None = None
    quiet: bool = False
    workers: Workers | None = None
    batches_a_piece: int | None = None
    shares: int | None = None

    @property
    def side_by_side(self) -> int:
        """How many pieces of work may be done at a time on this machine."""
        return max(self.at_once, len(self.devices))

    @property
    def experts_at_a_time(self) -> int:
        """How many experts are measured at a time on this machine, where each is a piece of its own."""
        return min(self.side_by_side, len(self.config.experts))

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
        from utils.models.weight_source import StreamedWeights
        from utils.passes.experts_in_parts import do_not_fit

        apart = subject.experts_apart
        if apart is None:
            apart = do_not_fit(subject.decoder, subject.layout, available_bytes(device))
        return StreamedWeights(subject.layout, device, subject.dtype, experts_apart=apart)

    def of(self, *subjects: Subject) -> "MeasureJob":
        """This job as a piece of it needs it: these subjects, with skeletons that nobody else uses; nothing of where it runs.

        Weights are placed into skeletons, so that pieces that run side by side need each their own; a skeleton takes some
        50 kB a block. (Other processes build skeletons of their own.)
        """
        if self.workers is None and (
            self.side_by_side > 1 or len({id(one.decoder) for one in subjects}) < len(subjects)
        ):
            subjects = tuple(replace(subject, decoder=subject.decoder.copied()) for subject in subjects)
        return MeasureJob(self.config, subjects, (), self.options, self.trust_remote_code)

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """Do all pieces with one progress bar, where `workers` or `devices` and `at_once` say; results in their order.

        Results are kept in `workspace`, the files that a piece wrote among them, in a folder of its name.

        Raises:
            UserError: what a piece raises; a GPU that ran out of memory.
        """
        say = (lambda line: None) if self.quiet else (lambda line: print(line, flush=True))
        workers = self.workers or LocalWorkers(self.devices, self.at_once, say, self.shares)
        with progress_bar("measuring", sum(piece.steps for piece in pieces), "block", quiet=self.quiet) as bar:

            def on_progress(label: str, steps: int) -> None:
                if steps:
                    bar.update(steps)
                else:
                    bar.set_postfix_str(label)

            return workers.run(pieces, self.workspace, on_progress)
