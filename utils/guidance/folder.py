"""The dataframe folder: what command 1 hands to command 2. CSV tables, and a manifest that is written last.

| file | content |
|---|---|
| `<type>_delta.csv`, `norms.csv` | what `lewis` measured (`utils/guidance/lewis/tables.py`) |
| `<method>_*.csv` | what another guidance method measured, tidy (its own module in `utils/guidance/`) |
| `manifest.json` | guidance, versions, models, sample ids, options, hashes |

One folder holds one measurement.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.publish import MANIFEST, file_sha256


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
        raise UserError(
            f"{path} is not valid JSON ({error}); measure again with --overwrite", "manifest-unreadable"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object; measure again with --overwrite", "manifest-unreadable")
    return data


def check_folder(folder: Path, manifest: Mapping[str, Any] | None, guidance: str) -> None:
    """Raise a `UserError` if a folder is missing or its manifest says that another guidance method filled it."""
    if not folder.is_dir():
        state = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--delta_dfs_in_dir {folder}: {state}; run lewis_importance.py first", "dataframes-missing")
    measured = (manifest or {}).get("guidance", guidance)
    if measured != guidance:
        raise UserError(
            f"--delta_dfs_in_dir {folder} holds what guidance {measured} measured, not {guidance}; give --guidance "
            f"{measured}, or measure with --guidance {guidance} into another folder",
            "dataframes-other-guidance",
        )


def hash_warnings(folder: Path, manifest: Mapping[str, Any] | None, names: Iterable[str]) -> list[str]:
    """Sentences about files that differ from what the manifest recorded."""
    recorded = (manifest or {}).get("files", {})
    return [
        f"{name} differs from what manifest.json recorded (edited since?); it is used as it is"
        for name in names
        if name in recorded and (folder / name).exists() and file_sha256(folder / name) != recorded[name]
    ]
