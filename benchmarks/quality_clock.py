"""Work that is done in parts: what each piece took, remembered beside it, and a time after which none is begun.

The sum of what the pieces took is what a run from nothing takes, on one core like theirs.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutOfTimeError(Exception):
    """The time is over, and there is work left that was never done."""


class Clock:
    """Times pieces of work by name; a piece that is done again, from what is cached of it, keeps its longest time."""

    def __init__(self, file: Path, until: float | None = None) -> None:
        """Remember in `file`; begin no new piece after `until` (seconds since the epoch; None: never stop)."""
        self.file, self.until = file, until
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def work(self, name: str) -> Iterator[None]:
        """Time a piece of work.

        Raises:
            OutOfTimeError: it was never done, and the time is over.
        """
        if name not in self.seconds and self.until is not None and time.time() > self.until:
            raise OutOfTimeError(name)
        start = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - start)

    def note(self, name: str, took: float) -> None:
        """Remember what a piece of work took that was timed elsewhere."""
        if took > self.seconds.get(name, 0.0):
            self.seconds[name] = took
            part = self.file.with_name(f"{self.file.name}.part")
            part.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")
            part.replace(self.file)

    @property
    def total(self) -> float:
        """Seconds that all pieces took."""
        return sum(self.seconds.values())
