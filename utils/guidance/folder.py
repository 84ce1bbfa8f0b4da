"""The dataframe folder: what command 1 hands to command 2. CSV tables, and a manifest that is written last.

| file | content |
|---|---|
| `<type>_delta.csv`, `norms.csv` | what `lewis` measured (`utils/guidance/lewis/tables.py`) |
| `<method>_*.csv` | what another guidance method measured, tidy (its own module in `utils/guidance/`) |
| `manifest.json` | guidance, versions, models, sample ids, options, hashes |

One folder holds one measurement.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import Problem, UserError, raise_collected
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.validation import show


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = read_json(path, str(path))
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN}", "manifest-unreadable") from error
    problems = [Problem(text, "manifest-malformed") for text in _malformed(data)]
    raise_collected(problems, f"{path} is not as lewis_importance.py writes it; {_AGAIN}")
    return data


_AGAIN = "measure again with --overwrite"


def _malformed(data: Mapping[str, Any]) -> Iterator[str]:
    """What in a manifest is of another kind than what is read of it; keys that are not there are looked at by their users."""
    if isinstance(data.get("command"), str) and data["command"] != "lewis_importance":
        return  # another command's, which its reader will see
    for key, kind in (("command", str), ("guidance", str), ("options", dict), ("files", dict), ("models", list)):
        if key in data and not isinstance(data[key], kind):
            yield f"{key} must be {_KINDS[kind]}, got {show(data[key])}"
            return
    for name, digest in data.get("files", {}).items():
        if not isinstance(digest, str):
            yield f"files.{name} must be text, got {show(digest)}"
    entries = data.get("options", {}).get("model_info")
    for where, listed in (("options.model_info", entries), ("models", data.get("models"))):
        for place, entry in enumerate(listed if isinstance(listed, list) else ()):
            if not isinstance(entry, dict):
                yield f"{where}[{place}] must be a mapping, got {show(entry)}"
                continue
            for key in ("type", "name", "header_sha256"):
                if not isinstance(entry.get(key, ""), str):
                    yield f"{where}[{place}].{key} must be text, got {show(entry[key])}"


_KINDS = {str: "text", dict: "a mapping", list: "a list"}


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
        Sentences about accepted files that differ.

    Raises:
        UserError: files differ or are gone, and that is not accepted: somebody edited them, or a run was killed while it
            put files of another measurement in their place.
    """
    recorded = (manifest or {}).get("files", {})
    differing = [
        name
        for name in names
        if name in recorded and (folder / name).exists() and file_sha256(folder / name) != recorded[name]
    ]
    if differing and not accepted:
        raise UserError(
            f"dataframe folder {folder}: {', '.join(differing)} differ from what manifest.json recorded. If you edited "
            "them, give --accept_edited; else a run was killed between two files: measure again with --overwrite",
            "dataframes-edited",
        )
    return [f"{name} differs from what manifest.json recorded; it is used as it is" for name in differing]
