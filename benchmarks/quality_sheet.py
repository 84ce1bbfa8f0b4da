"""A CSV that several processes append to, a line at a time; a run that is cut goes on with what is there."""

import csv
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO


class Sheet:
    """Lines of one dataclass in a file; `key` names the fields that say which piece of work a line is of."""

    def __init__(self, path: Path, kind: type, key: tuple[str, ...]) -> None:
        """Open or begin the file. Raises `ValueError` if it has other columns."""
        self.path, self.names, self.key = path, [field.name for field in fields(kind)], key
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._held() as file:
            header = file.readline()
            if not header:
                csv.writer(file, lineterminator="\n").writerow(self.names)
            elif next(csv.reader([header])) != self.names:
                raise ValueError(f"{path} has other columns; give another file")

    def has(self, **key: Any) -> bool:
        """Whether some line is of this piece of work."""
        wanted = {name: str(value) for name, value in key.items()}
        assert wanted.keys() == set(self.key)
        with self._held() as file:
            return any(wanted.items() <= row.items() for row in csv.DictReader(file))

    def add(self, *lines: Any) -> None:
        """Write all lines of a piece of work."""
        with self._held() as file:
            file.seek(0, 2)
            writer = csv.DictWriter(file, self.names, lineterminator="\n")
            writer.writerows(asdict(line) for line in lines)

    @contextmanager
    def _held(self) -> Iterator[TextIO]:
        with open(self.path, "a+", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file
