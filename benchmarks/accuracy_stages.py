"""Stages of a long benchmark as processes side by side: each begins when what it needs is there, none after a time.

What a stage took is remembered beside its output, so that a run in parts has the seconds of all of them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_FILE = "seconds.json"
UNFINISHED = 75  # the exit status of a stage that the time cut (sysexits.h: temporary failure)


@dataclass(frozen=True)
class Stage:
    """One process: a script of this project with its flags, and the stages that have to be done before it.

    `is_made` says whether its result is there; then it is not begun. `words` are made when it begins.
    """

    name: str
    needs: tuple[str, ...]
    words: Callable[[], Sequence[object]]
    is_made: Callable[[], bool]


@dataclass
class Outcome:
    """Which stages are done, which failed, and which are left since the time was over or something else failed."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Stages:
    """Runs stages side by side and keeps their logs and seconds."""

    def __init__(self, folder: Path, environment: Mapping[str, str], at_once: int, until: float | None) -> None:
        """Prepare to run.

        Args:
            folder: takes the logs.
            environment: added to this process's own.
            at_once: stages side by side, at most.
            until: no stage is begun after that (seconds since the epoch); None: never stop.
        """
        self.folder, self.at_once, self.until = folder, at_once, until
        self.environment = {**os.environ, **environment}
        self.outcome = Outcome()
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """What every stage took that was done here, in this run or an earlier one."""
        file = self.folder / SECONDS_FILE
        return json.loads(file.read_text()) if file.exists() else {}

    def run(self, stages: Sequence[Stage], on_done: Callable[[str], Sequence[Stage]]) -> Outcome:
        """Run all stages, the first ones first where several could begin.

        Args:
            stages: what is to be made.
            on_done: called with the name of a stage that is done; gives stages that are to be made, too.
        """
        waiting = list(stages)
        try:
            moved = True
            while moved or self._running:
                moved = False
                for stage in [one for one in waiting if self._is_ready(one)]:
                    if stage.is_made():
                        waiting += self._note_done(stage.name, on_done)
                    elif len(self._running) < self.at_once and (self.until is None or time.time() < self.until):
                        self._begin(stage)
                    else:
                        continue
                    waiting.remove(stage)
                    moved = True
                for name in [name for name, (process, _) in self._running.items() if process.poll() is not None]:
                    waiting += self._note_done(name, on_done) if self._end(name) else ()
                    moved = True
                if not moved:
                    time.sleep(0.1)
        finally:
            for process, _ in self._running.values():
                process.terminate()
        self.outcome.left += [one.name for one in waiting]
        return self.outcome

    def _is_ready(self, stage: Stage) -> bool:
        return all(need in self.outcome.done for need in stage.needs)

    def _note_done(self, name: str, on_done: Callable[[str], Sequence[Stage]]) -> Sequence[Stage]:
        self.outcome.done.append(name)
        return on_done(name)

    def _begin(self, stage: Stage) -> None:
        print(f"{stage.name}: begins", file=sys.stderr, flush=True)
        words = [sys.executable, *map(str, stage.words())]
        with open(self._log(stage.name), "w", encoding="utf-8") as log:
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=self.environment)
        self._running[stage.name] = process, time.perf_counter()

    def _end(self, name: str) -> bool:
        """Note how a stage ended; whether it is done."""
        process, start = self._running.pop(name)
        took = time.perf_counter() - start
        print(f"{name}: {took:.1f} s, exit status {process.returncode}", file=sys.stderr, flush=True)
        file = self.folder / SECONDS_FILE
        file.write_text(json.dumps(self.seconds | {name: self.seconds.get(name, 0.0) + took}, indent=1))
        if process.returncode == 0:
            return True
        if process.returncode == UNFINISHED:
            self.outcome.left.append(name)
        else:
            self.outcome.failed.append(name)
            print("\n".join(self._log(name).read_text().splitlines()[-30:]), file=sys.stderr, flush=True)
        return False

    def _log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.log"
