"""Time and disk while a search runs: what its first round says of the rest, and whether another round is allowed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.commands.search_setup import Prepared, memory_line
from utils.evaluation.candidates import Candidate
from utils.runtime import gigabytes, peak_host_bytes
from utils.searching.forecast import Pace, forecast
from utils.searching.rounds import Round

_AT_THE_END = 8  # about so many candidates are scored on test rows: the pair, the best, uniform ones


class Enough(Exception):
    """The time or disk that was allowed is used up: what runs is left for the next time, the search ends."""


@dataclass
class Watch:
    """Watches a search. State: the pace of its last round, and what was spent and held by then.

    `write` takes sentences; `batches_left` is how many batches will still be asked for.
    """

    ready: Prepared
    write: Callable[[str], None]
    batches_left: int = 1
    pace: Pace | None = None
    _spent: tuple[float, float] = field(init=False, repr=False)
    _held: int = field(init=False, repr=False)
    _grown: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._spent = self._seconds()  # of the pair's own losses, until now
        self._held = folder_bytes(self.ready.options.out_dir)

    def may_score(self, candidates: Sequence[Candidate], losses: int) -> None:
        """Raise `Enough` if a round would go over the time, or the folder over the disk, that is allowed."""
        options = self.ready.options
        if options.max_hours is not None:
            needed = time.perf_counter() - self.ready.start
            if self.pace is not None:
                needed += self.pace.seconds(len(candidates), losses) + self._end_seconds(self.pace)
            if needed > 3600 * options.max_hours:
                raise Enough(f"--max_hours {options.max_hours:g}: a round more would take too long")
        if options.max_disk is not None:
            held = folder_bytes(options.out_dir)
            self._grown, self._held = max(self._grown, held - self._held), held
            written = self.ready.scorer.written_bytes(candidates) * self.ready.writing_at_once
            if held + self._grown + written > options.max_disk:
                beside = f", beside {gigabytes(written)} of models that are written for a while" if written else ""
                raise Enough(
                    f"--max_disk: {options.out_dir} holds {gigabytes(held)}, and a round adds up to "
                    f"{gigabytes(self._grown)}{beside}"
                )

    def on_round(self, done: Round) -> None:
        """Take the pace of what was scored; after the first round, the forecast."""
        spent, first = self._seconds(), self.pace is None
        if done.scored:
            weights, forward = (now - before for now, before in zip(spent, self._spent, strict=True))
            self.pace = Pace.measured(weights, forward, done.candidates, done.scored)
        self._spent = spent
        if done.scored and first:
            self.write(self._forecast(self.pace, done))
        who = "1 candidate" if done.candidates == 1 else f"{done.candidates} candidates"
        self.write(f"batch {done.batch}: {who} read {done.rows} rows; beaten or failed: {done.beaten}")

    def _forecast(self, pace: Pace, done: Round) -> str:
        ready, options = self.ready, self.ready.options
        rounds = [sum(seen) for seen in ready.search.schedule()]
        left = sum(not trial.state.is_finished() for trial in ready.study.trials)
        left += max(0, options.trials - len(ready.study.trials))
        coming = forecast(pace, left, self.batches_left, rounds, _AT_THE_END, self._test_rows())
        held = folder_bytes(options.out_dir)
        each = max(0, held - self._held) / max(1, done.candidates)  # what a candidate has added in one of its rounds
        disk = held + each * left * len(rounds) + ready.written
        said = f"forecast: {coming.shown} for the {left} trials that are left and the end; {gigabytes(disk)} of disk"
        return "; ".join(filter(None, [said, memory_line(ready)])) + f"; {gigabytes(peak_host_bytes())} held so far"

    def _seconds(self) -> tuple[float, float]:
        seconds = self.ready.scorer.seconds
        return seconds.weights, seconds.forward

    def _test_rows(self) -> int:
        return sum(len(task.part("test")) for task in self.ready.scorer.tasks)

    def _end_seconds(self, pace: Pace) -> float:
        return pace.seconds(_AT_THE_END, _AT_THE_END * self._test_rows())


def folder_bytes(folder: Path) -> int:
    """How much a folder holds."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a temporary file that is gone by now
            continue
    return found
