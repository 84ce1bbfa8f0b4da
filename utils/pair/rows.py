"""Rows of a local data file: JSON lines, JSON, CSV, Parquet or plain text.

Every line of a file is checked; only chosen rows are kept in memory for the line formats, and half a
gibibyte of Parquet.
"""

import bisect
import contextlib
import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, brief
from utils.named_paths import check_path

Rows = Sequence[Mapping[str, Any]]
PARQUET_KEPT_BYTES = 2**29  # of a Parquet file's rows in memory
PARQUET_MOST_GROUP_BYTES = 2**31
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zX": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def looks_like_file(path: str) -> bool:
    """Whether a `dataset.path` means a local file rather than a hub id."""
    return path.startswith((".", "/", "~")) or Path(path).suffix.lower() in READERS or os.path.exists(path)


def data_file(path: str) -> Path:
    """The local file that a `dataset.path` names, of a kind that can be read.

    Raises:
        UserError: it is missing, a folder, or of an unknown kind; or the locale cannot name it.
    """
    check_path(path, f"dataset.path {path}")
    file = Path(os.path.expanduser(path))
    if not os.path.exists(file):
        if "://" in path:
            raise UserError(f"dataset.path {path} is a URL; download the file and give its name", "text-url")
        state = "is a broken symbolic link" if os.path.islink(file) else f"does not exist (looked in {Path.cwd()})"
        raise UserError(f"dataset.path {path} {state}", "text-missing")
    if file.is_dir():
        raise UserError(f"dataset.path {path} is a folder; give the file", "text-is-folder")
    if not file.is_file():
        raise UserError(f"dataset.path {path} is not a plain file: it is read more than once", "text-not-a-file")
    if file.suffix.lower() not in READERS:
        raise UserError(f"dataset.path {path}: unknown kind of file; known: {', '.join(READERS)}", "text-kind")
    return file


def local_rows(path: str) -> Rows:
    """Open a local data file as a sequence of rows (column name to value).

    Raises:
        UserError: there is no such file (`data_file`), or it is compressed or malformed (with the line).
    """
    file = data_file(path)
    try:
        with open(file, "rb") as stream:
            start = stream.read(4)
        if packed := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None):
            raise UserError(
                f"dataset.path {path} is compressed ({packed}), whatever its name says; unpack it first",
                "text-compressed",
            )
        return READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise UserError(
            f"dataset.path {path} is not UTF-8 text (byte {error.start}); save it as UTF-8", "text-not-utf8"
        ) from error
    except PermissionError as error:
        raise UserError(f"dataset.path {path} cannot be read: permission denied", "text-unreadable") from error


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


def _decoded(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"dataset.path {file}, line {number}: not UTF-8 text (byte {error.start}); save it as UTF-8",
            "text-not-utf8",
        ) from error


def _json_lines(file: Path) -> Rows:
    def parse(line: bytes, number: int) -> Mapping[str, Any]:
        text = _decoded(line, file, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"dataset.path {file}, line {number}: not valid JSON: {error}", "text-invalid") from error
        if not isinstance(row, dict):
            raise UserError(
                f"dataset.path {file}, line {number}: a row must be an object, got {type(row).__name__}", "text-bad-row"
            )
        return row

    return _Lines(file, parse)


def _text_lines(file: Path) -> Rows:
    return _Lines(file, lambda line, number: {"text": _decoded(line, file, number).rstrip("\r\n")})


def _refuse_column_twice(file: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(
            f"dataset.path {file}: a column is given twice ({', '.join(names)}); rename one", "text-column-twice"
        )


def _json(file: Path) -> Rows:
    with open(file, "rb") as stream:
        if not stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return _json_lines(file)  # data sets often name JSON lines .json
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"dataset.path {file} is not valid JSON: {error}", "text-invalid") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"dataset.path {file} must hold a list of objects", "text-bad-row")
    return rows


def _csv(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses a long text
    text = file.read_bytes().decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise UserError(
            f"dataset.path {file}, line {reader.line_num}: not valid CSV: {error}", "text-invalid"
        ) from error
    names = lines[0][1] if lines else []
    _refuse_column_twice(file, names)
    for number, fields in lines[1:]:
        if len(fields) != len(names):
            raise UserError(
                f"dataset.path {file}, line {number}: {len(fields)} fields where the first line has {len(names)} "
                "(fields are separated by commas; quote a field that holds one)",
                "text-bad-row",
            )
    return [dict(zip(names, fields, strict=True)) for _, fields in lines[1:]]


class _ParquetRows(Sequence):
    """Rows of a Parquet file as plain Python values, nulls as None.

    It is read, and checked, group by group of rows. What fits into `PARQUET_KEPT_BYTES` stays in memory, other groups are read
    again when one of their rows is asked for. Text that the file writes once for many rows is not written out.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.kept: dict[int, Any] = {}  # tables by the number of their group
        self.last: tuple[int, Any] = (-1, None)  # of those that are not kept
        with self._named(), self._opened() as opened:
            _refuse_column_twice(file, opened.schema_arrow.names)
            groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
            self.ends = list(itertools.accumulate(group.num_rows for group in groups))
            held = 0
            for number, group in enumerate(groups):
                self._refuse_large(number, group.total_byte_size)
                table = opened.read_row_group(number)
                table.validate(full=True)
                if table.num_rows != group.num_rows:
                    raise ValueError(f"row group {number} has {table.num_rows} rows, not {group.num_rows}")
                held += table.nbytes
                if held <= PARQUET_KEPT_BYTES:
                    self.kept[number] = table

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self.ends, index)
        before = self.ends[number - 1] if number else 0
        return self._group(number).slice(index - before, 1).to_pylist()[0]

    def _group(self, number: int) -> Any:
        if number in self.kept:
            return self.kept[number]
        if self.last[0] != number:
            with self._named(), self._opened() as opened:
                self.last = number, opened.read_row_group(number)
        return self.last[1]

    def _opened(self) -> Any:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.file) as opened:
            columns = [opened.schema.column(number) for number in range(len(opened.schema))]
        return ParquetFile(
            self.file, read_dictionary=[one.path for one in columns if one.physical_type == "BYTE_ARRAY"]
        )

    def _refuse_large(self, number: int, size: int) -> None:
        if size > PARQUET_MOST_GROUP_BYTES:
            raise UserError(
                f"dataset.path {self.file}: row group {number} takes {size / 2**30:.1f} GiB unpacked, more than "
                f"{PARQUET_MOST_GROUP_BYTES / 2**30:g}; write the file again with smaller ones (pandas: "
                "to_parquet(path, row_group_size=10000))",
                "text-row-group-too-large",
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # pyarrow raises errors of many kinds for a file that is damaged or not Parquet
            raise UserError(
                f"dataset.path {self.file} is not a readable Parquet file: {brief(error)}", "text-invalid"
            ) from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _ParquetRows,
    ".txt": _text_lines,
    ".md": _text_lines,
}
