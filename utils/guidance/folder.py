"""The dataframe folder: what command 1 hands to command 2. CSV tables, and a manifest that is written last.

| file | content |
|---|---|
| `<type>_delta.csv`, `norms.csv` | what `lewis` measured (`utils/guidance/lewis/tables.py`) |
| `<method>_*.csv` | what another guidance method measured, tidy (its own module in `utils/guidance/`) |
| `manifest.json` | guidance, versions, models, sample ids, options, hashes |

One folder holds one measurement.
"""

from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.guidance.start import START
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.validation import read_checked

COMMAND = "lewis_importance"  # what a manifest of ours says
_AGAIN = "measure again with --overwrite"
_read = partial(dataclass, config=ConfigDict(extra="ignore"))


@_read
class _Model:
    type: str = ""
    name: str = ""
    header_sha256: str = ""


@_read
class _Options:
    model_info: list[_Model] = field(default_factory=list)


@_read
class _Manifest:
    """What is read of a manifest; keys that are not there are looked at by their users."""

    command: str = ""
    guidance: str = ""
    options: _Options = field(default_factory=_Options)
    files: dict[str, str] = field(default_factory=dict)
    models: list[_Model] = field(default_factory=list)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = read_json(path, str(path), finite=True)
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN}", "manifest-unreadable") from error
    # another command's is for its reader to see
    if not isinstance(data.get("command", ""), str) or is_measurement(data):
        heading = f"{path} is not as lewis_importance.py writes it; {_AGAIN}"
        read_checked(_Manifest, data, heading, "manifest")
    return data


def measured_by(folder: Path) -> str | None:
    """The guidance that filled a folder; None if it does not say so, or is none. Raises as `read_manifest`."""
    found = read_manifest(folder) if folder.is_dir() else None
    name = (found or {}).get("guidance")
    return name if isinstance(name, str) else None


def is_measurement(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is of a measurement, of this version or of one that did not write down its command."""
    return manifest.get("command", COMMAND if "models" in manifest else "") == COMMAND


def check_folder(folder: Path, manifest: Mapping[str, Any] | None, guidance: str) -> None:
    """Raise a `UserError` if a folder is missing or its manifest says that another guidance method filled it, and started from
    none that this one has measured."""
    if not folder.is_dir():
        state = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--delta_dfs_in_dir {folder}: {state}; run lewis_importance.py first", "dataframes-missing")
    measured = (manifest or {}).get("guidance", guidance)
    options = (manifest or {}).get("guidance_options")
    started = options.get(START) if isinstance(options, dict) else None
    if guidance not in (measured, started):
        raise UserError(
            f"--delta_dfs_in_dir {folder} holds what guidance {measured} measured, not {guidance}; give --guidance "
            f"{measured}, or measure with --guidance {guidance} into another folder",
            "dataframes-other-guidance",
        )


def refuse_edited(
    folder: Path, manifest: Mapping[str, Any] | None, names: Iterable[str], *, accepted: bool
) -> list[str]:
    """Compare files with the hashes that the manifest recorded.

    Args:
        folder: the dataframe folder.
        manifest: what it says of itself; without one nothing is known.
        names: the files that will be read.
        accepted: whether files that differ are taken as they are.

    Returns:
        Sentences about accepted files that differ, or that the manifest does not list.

    Raises:
        UserError: files differ or are gone, and that is not accepted: somebody edited them, or a run was killed while it
            put files of another measurement in their place.
    """
    if "files" not in (manifest or {}):
        return []
    recorded = manifest["files"]
    there = [name for name in names if (folder / name).exists()]
    differing = [
        f"{name} differs from what manifest.json recorded"
        if name in recorded
        else f"manifest.json does not list {name}"
        for name in there
        if name not in recorded or file_sha256(folder / name) != recorded[name]
    ]
    if differing and not accepted:
        raise UserError(
            f"dataframe folder {folder}: {'; '.join(differing)}. If you edited that or put it there, give --accept_edited; "
            "else a run was killed between two files: measure again with --overwrite",
            "dataframes-edited",
        )
    return [f"{what}; it is used as it is" for what in differing]
