"""CSV files of a dataframe folder: written so that numbers read back bit for bit, and read strictly."""

import io
import warnings
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from utils.bounded_files import read_bounded
from utils.errors import UserError, brief

_MOST_COLUMNS, _MOST_BYTES = 10_000, 2**30


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """A frame as CSV: no index, shortest text that reads back to the same float64, `\\n` line ends."""
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue().encode()


def read_csv(path: Path, text: Collection[str] = ()) -> pd.DataFrame:
    """A CSV file as a frame, read strictly.

    Args:
        path: the file.
        text: columns that are read as they stand, an empty cell as "" (`NA` and `01` are names there, no numbers). Of
            other columns an empty cell is NaN.

    Raises:
        UserError: missing, no regular file, above 1 GiB, not UTF-8, not a comma-separated table, more than 10,000 columns,
            a column given twice, a blank line, a row that is too long.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; run lewis_importance.py with this config and guidance first", MISSING)
    try:
        content = read_bounded(path, str(path), _MOST_BYTES)
        lines = content.decode("utf-8-sig").splitlines()
        header = lines[0].split(",") if lines else []
        if len(header) > _MOST_COLUMNS:  # pandas takes kilobytes for each, whatever is in it
            raise UserError(f"{path}: {len(header)} columns are more than any measurement has", UNREADABLE)
        if len(set(header)) != len(header):  # pandas would rename the second one
            raise UserError(f"{path}: a column is given twice", UNREADABLE)
        if any(not line.strip() for line in lines):
            raise UserError(f"{path}: a line is blank; every layer needs its row", UNREADABLE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas 3.1 makes round_trip the default and deprecates naming it
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with too many fields
            frame = pd.read_csv(
                io.BytesIO(content),
                encoding="utf-8-sig",
                index_col=False,
                float_precision="round_trip",
                dtype=dict.fromkeys(text, str),
                keep_default_na=False,
                na_values={name: [""] for name in header if name not in text},
            )
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", UNREADABLE) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path} is not a comma-separated table: {brief(error)}", UNREADABLE) from error
    if len(frame) != len(lines) - 1:
        raise UserError(f"{path}: {len(lines) - 1} lines but {len(frame)} rows can be read", UNREADABLE)
    return frame


MISSING, UNREADABLE = "table-missing", "table-unreadable"
