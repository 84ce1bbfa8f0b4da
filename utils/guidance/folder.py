"""The dataframe folder: what command 1 hands to command 2. CSV tables, and a manifest that is written last.

| file | content |
|---|---|
| `<type>_delta.csv`, `norms.csv` | what `lewis` measured (`utils/guidance/lewis/tables.py`) |
| `<method>_*.csv` | what another guidance method measured, tidy (its own module in `utils/guidance/`) |
| `manifest.json` | guidance, versions, models, sample ids, options, hashes |

One folder holds one measurement.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.publish import MANIFEST, file_sha256

if TYPE_CHECKING:
    import pandas as pd


def csv_bytes(frame: "pd.DataFrame") -> bytes:
    """A frame as CSV: no index, shortest text that reads back to the same float64, `\\n` line ends."""
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue().encode()


def folder_files(files: Mapping[str, bytes | Path], manifest: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """The content of a dataframe folder by file name: the files, then the manifest, which gains their hashes."""
    hashes = {
        name: file_sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for name, content in files.items()
    }
    text = json.dumps({**manifest, "files": hashes}, indent=2, ensure_ascii=False, allow_nan=False)
    return {**files, MANIFEST: (text + "\n").encode()}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); measure again with --overwrite") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object; measure again with --overwrite")
    return data


def check_folder(folder: Path, manifest: Mapping[str, Any] | None, guidance: str) -> None:
    """Raise a `UserError` if a folder is missing or its manifest says that another guidance method filled it."""
    if not folder.is_dir():
        raise UserError(f"--delta_dfs_in_dir {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    measured = (manifest or {}).get("guidance", guidance)
    if measured != guidance:
        raise UserError(
            f"--delta_dfs_in_dir {folder} holds what guidance {measured} measured, not {guidance}; give --guidance "
            f"{measured}, or measure with --guidance {guidance} into another folder"
        )


def read_table(folder: Path, name: str, columns: Sequence[str], *, may_be_empty: bool = False) -> "pd.DataFrame":
    """A tidy table of a dataframe folder; it must have exactly these columns and, unless it may be empty, a row.

    Raises:
        UserError: the file is missing or unreadable, or has other columns or no rows.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; run lewis_importance.py with this config and guidance first")
    table = read_csv(path)
    if list(table.columns) != list(columns):
        raise UserError(f"{path}: columns must be {','.join(columns)}, got {','.join(map(str, table.columns))}")
    if table.empty and not may_be_empty:
        raise UserError(f"{path} has no rows; measure again with --overwrite")
    return table


def read_csv(path: Path) -> "pd.DataFrame":
    """A CSV file as a frame, read strictly.

    Raises:
        UserError: not UTF-8, not a comma-separated table, a column given twice, a blank line, a row that is too long.
    """
    import pandas as pd

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        header = lines[0].split(",") if lines else []
        if len(set(header)) != len(header):  # pandas would rename the second one
            raise UserError(f"{path}: a column is given twice")
        if any(not line.strip() for line in lines):
            raise UserError(f"{path}: a line is blank; every layer needs its row")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas 3.1 makes round_trip the default and deprecates naming it
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with too many fields
            frame = pd.read_csv(path, encoding="utf-8-sig", index_col=False, float_precision="round_trip")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path} is not a comma-separated table: {error}") from None
    if len(frame) != len(lines) - 1:
        raise UserError(f"{path}: {len(lines) - 1} lines but {len(frame)} rows can be read")
    return frame


def hash_warnings(folder: Path, manifest: Mapping[str, Any] | None, names: Iterable[str]) -> list[str]:
    """Sentences about files that differ from what the manifest recorded."""
    recorded = (manifest or {}).get("files", {})
    return [
        f"{name} differs from what manifest.json recorded (edited since?); it is used as it is"
        for name in names
        if name in recorded and (folder / name).exists() and file_sha256(folder / name) != recorded[name]
    ]
