"""Rows of a local data file: JSON lines, JSON, CSV, Parquet or plain text.

Every line of a file is checked; only chosen rows are kept in memory for the line formats.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError

Rows = Sequence[Mapping[str, Any]]


def looks_like_file(path: str) -> bool:
    """Whether a `dataset.path` means a local file rather than a hub id."""
    expanded = Path(path).expanduser()
    return path.startswith((".", "/", "~")) or expanded.suffix.lower() in READERS or expanded.exists()


def local_rows(path: str) -> Rows:
    """Open a local data file as a sequence of rows (column name to value).

    Raises:
        UserError: the file is missing, a folder, of an unknown kind, or malformed (with the line).
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"dataset.path {path} does not exist (looked in {Path.cwd()})")
    if file.is_dir():
        raise UserError(f"dataset.path {path} is a folder; give the file")
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"dataset.path {path}: unknown kind of file; known: {', '.join(READERS)}")
    try:
        return reader(file)
    except UnicodeDecodeError as error:
        raise UserError(f"dataset.path {path} is not UTF-8 text (byte {error.start})") from None
    except PermissionError:
        raise UserError(f"dataset.path {path} cannot be read: permission denied") from None


class _Lines(Sequence):
    """Rows of a line-oriented file, read when asked for; `parse` turns one line into a row."""

    def __init__(self, file: Path, parse: Callable[[bytes, int], Mapping[str, Any]]) -> None:
        self.file, self.parse = file, parse
        self.offsets: list[tuple[int, int]] = []  # (byte offset, line number)
        with open(file, "rb") as stream:
            offset = 0
            for number, line in enumerate(stream, 1):
                if line.strip():
                    parse(line, number)
                    self.offsets.append((offset, number))
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        offset, number = self.offsets[index]
        with open(self.file, "rb") as stream:
            stream.seek(offset)
            return self.parse(stream.readline(), number)


def _json_lines(file: Path) -> Rows:
    def parse(line: bytes, number: int) -> Mapping[str, Any]:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"dataset.path {file}, line {number}: not UTF-8 text (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"dataset.path {file}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"dataset.path {file}, line {number}: a row must be an object, got {type(row).__name__}")
        return row

    return _Lines(file, parse)


def _text_lines(file: Path) -> Rows:
    def parse(line: bytes, number: int) -> Mapping[str, Any]:
        try:
            return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise UserError(f"dataset.path {file}, line {number}: not UTF-8 text (byte {error.start})") from None

    return _Lines(file, parse)


def _json(file: Path) -> Rows:
    with open(file, "rb") as stream:
        if not stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return _json_lines(file)  # data sets often name JSON lines .json
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"dataset.path {file} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"dataset.path {file} must hold a list of objects")
    return rows


def _table(file: Path) -> Rows:
    import pandas as pd

    try:
        if file.suffix.lower() == ".parquet":
            frame = pd.read_parquet(file)
        else:
            frame = pd.read_csv(file, keep_default_na=False, dtype=str, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError, OSError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"dataset.path {file} cannot be read: {str(error).splitlines()[0]}") from None
    return _Table(frame)


class _Table(Sequence):
    """Rows of a pandas frame, with arrays as lists and missing values as None."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self.frame.iloc[index].to_dict()
        return {str(key): _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    return value


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".parquet": _table,
    ".txt": _text_lines,
    ".md": _text_lines,
}
