"""What the columns of a measured table are, and the one reader that holds a file to it.

SPREADS = TableFormat("spreads.csv", (expert("model"), whole("layer"), number("spread")), key=("model", "layer"))

SPREADS.content(rows)                                          the file that a *measure* half writes
(spreads,) = read_tables(folder, [SPREADS], experts)           a *decide* half's frame: text, int64 and float64 columns

What is wrong with single cells, and rows that are there twice, is found here; what a table lacks only its method knows
(`row_problems`, `grid_problems`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from utils.errors import Problem, UserError, raise_collected
from utils.guidance.csv_files import csv_bytes, read_csv

_EXACT = 2**53  # whole numbers up to here are their own float64


@dataclass(frozen=True)
class Column:
    """One column: `expert` and `text` hold names, `whole` and `number` numbers from `least` to below `below`.

    With `names` only those may stand in a text column; with `blank` it may be empty.
    """

    name: str
    kind: Literal["expert", "text", "whole", "number"]
    least: float = 0.0
    below: float = float("inf")
    names: tuple[str, ...] = ()
    blank: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it holds names."""
        return self.kind in ("expert", "text")


def expert(name: str) -> Column:
    """A column of types of experts of the pair config."""
    return Column(name, "expert")


def text(name: str, *, names: Iterable[str] = (), blank: bool = False) -> Column:
    """A column of names."""
    return Column(name, "text", names=tuple(names), blank=blank)


def whole(name: str, least: int = 0, below: int = _EXACT) -> Column:
    """A column of whole numbers."""
    return Column(name, "whole", least, below)


def number(name: str, least: float = 0.0, *, blank: bool = False) -> Column:
    """A column of finite numbers; with `blank` a cell may be empty, which is NaN."""
    return Column(name, "number", least, blank=blank)


@dataclass(frozen=True)
class TableFormat:
    """A file, its columns in their order, and those whose values together no two rows share (none: no such rule).

    Each of `last` may stand behind the columns or not, and counts for the key where it does; `may_be_empty` allows a table
    without rows.
    """

    file: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    last: tuple[Column, ...] = ()
    may_be_empty: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the columns that must be there."""
        return [column.name for column in self.columns]

    def frame(self, rows: Iterable[Sequence[object]]) -> pd.DataFrame:
        """Rows with their columns' names."""
        return pd.DataFrame(list(rows), columns=self.names)

    def content(self, rows: Iterable[Sequence[object]]) -> bytes:
        """The file of rows."""
        return csv_bytes(self.frame(rows))


def read_tables(folder: Path, formats: Sequence[TableFormat], experts: Collection[str]) -> list[pd.DataFrame]:
    """Read tables of a dataframe folder, in the order asked for.

    Args:
        folder: the dataframe folder.
        formats: what is asked for.
        experts: every type of the pair config; columns of experts hold no others.

    Returns:
        Frames whose columns are str, int64 or float64.

    Raises:
        UserError: a file is missing or unreadable, or has other columns or no rows; a value is not of its column's kind;
            a key is there twice. What is wrong with the rows of all tables is in the one message.
    """
    tables, problems = [], []
    for form in formats:
        table, found = _read(folder, form, experts)
        tables.append(table)
        problems += found
    raise_collected(problems, f"dataframe folder {folder}")
    return tables


def read_listed(
    folder: Path, manifest: Mapping[str, Any] | None, form: TableFormat, experts: Collection[str]
) -> pd.DataFrame | None:
    """A table that only some measurements have; None where the folder's manifest does not list it. Raises as `read_tables`."""
    if form.file not in (manifest or {}).get("files", {}):
        return None
    (table,) = read_tables(folder, [form], experts)
    return table


def _read(folder: Path, form: TableFormat, experts: Collection[str]) -> tuple[pd.DataFrame, list[Problem]]:
    path = folder / form.file
    table = read_csv(path, [column.name for column in (*form.columns, *form.last) if column.is_text])
    if list(table.columns) != [*form.names, *(one.name for one in form.last if one.name in table.columns)]:
        got = ",".join(map(str, table.columns))
        raise UserError(f"{path}: columns must be {','.join(form.names)}, got {got}", "table-columns")
    if table.empty and not form.may_be_empty:
        raise UserError(f"{path} has no rows; measure again with --overwrite", "table-no-rows")
    return checked(table, form, experts)


def checked(
    table: pd.DataFrame, form: TableFormat, experts: Collection[str] = ()
) -> tuple[pd.DataFrame, list[Problem]]:
    """A table that `read_csv` gave, in its columns' kinds, and what is wrong with its cells and its key.

    Args:
        table: has the format's columns, those of `last` or not.
        form: the format.
        experts: every type of the pair config.
    """
    columns = [column for column in (*form.columns, *form.last) if column.name in table.columns]
    problems = [problem for column in columns for problem in _cell_problems(table, form, column, experts)]
    if problems:
        return table, problems
    kinds = {"whole": "int64", "number": "float64"}
    table = table.astype({column.name: kinds[column.kind] for column in columns if not column.is_text})
    key = _key_of(form, table.columns)
    twice = table[table.duplicated(key)] if key else table[:0]
    return table, [Problem(f"{_place(form, row)} is there twice", "table-row-twice") for _, row in twice.iterrows()]


def _key_of(form: TableFormat, columns: Collection[str]) -> list[str]:
    return [name for name in form.key if name in columns]


def _cell_problems(table: pd.DataFrame, form: TableFormat, column: Column, experts: Collection[str]) -> list[Problem]:
    """What is wrong with a column's values: the first row of each kind, and how many there are."""
    values = table[column.name]
    if column.kind == "expert":
        strangers = sorted(set(values) - set(experts))
        return [
            Problem(f"{form.file}: {column.name} {name!r} is not an expert of the config", "table-unknown-expert")
            for name in strangers
        ]
    if column.kind == "text":
        bad = values.isin([] if column.blank else [""])
        if column.names:
            bad |= ~values.isin(column.names)
        wanted = f"one of {', '.join(column.names)}" if column.names else "a name"
    else:
        numbers = pd.to_numeric(values, errors="coerce")
        bad = ~((numbers >= column.least) & (numbers < column.below) & (numbers > -float("inf")))
        bad &= ~(values.isna() & column.blank)
        kind = "finite number"
        if column.kind == "whole":
            bad |= numbers != numbers.round()
            kind = "whole number"
        wanted = f"a {kind}" + (f" of at least {column.least:g}" if column.least > -_EXACT else "")
        wanted += f", below {column.below}" if column.below < _EXACT else ""
    if not bad.any():
        return []
    row = table.loc[bad.idxmax()]
    shown = repr(row[column.name]) if isinstance(row[column.name], str) else str(row[column.name])
    more = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
    return [
        Problem(f"{_place(form, row)}: {column.name} is {shown}, not {wanted}{more}", "table-bad-value"),
    ]


def _place(form: TableFormat, row: pd.Series) -> str:
    key = _key_of(form, row.index)
    return f"{form.file}, line {row.name + 2}" + (f" ({_named(key, row)})" if key else "")


def _named(key: Sequence[str], values: Mapping[str, object] | pd.Series) -> str:
    return ", ".join(f"{name} {values[name]}" for name in key)


def row_problems(form: TableFormat, table: pd.DataFrame, wanted: Iterable[tuple[object, ...]]) -> list[Problem]:
    """What a table lacks of the rows with these keys, and which others it has.

    Args:
        form: its format, for the names of the key's columns.
        table: as read, the rows of no expert but those of `wanted`.
        wanted: values of the key's columns.
    """
    there = set(table[list(form.key)].itertuples(index=False, name=None))
    asked = list(wanted)
    problems = [
        Problem(
            f"{form.file}: no row for {_named(form.key, dict(zip(form.key, one, strict=True)))}", "table-row-missing"
        )
        for one in asked
        if one not in there
    ]
    return problems + [
        Problem(
            f"{form.file}: {_named(form.key, dict(zip(form.key, one, strict=True)))}: there should be no such row",
            "table-row-unexpected",
        )
        for one in sorted(there - set(asked), key=repr)
    ]


def grid_problems(table: pd.DataFrame, where: str) -> list[Problem]:
    """Components of a table (columns `layer`, `component`) that a layer has more than once.

    A layer may lack a component: blocks differ in hybrids. What a base on this machine has and a table lacks is found
    where tensors are named (`utils/recipes/naming.py`).
    """
    counts = table.groupby(["component", "layer"], sort=False).size()
    return [
        Problem(f"{where}: {count} rows for layer {layer}, component {component}; there must be one", "table-row-twice")
        for (component, layer), count in counts.items()
        if count > 1
    ]
