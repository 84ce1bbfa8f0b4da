"""The dataframe folder: what command 1 hands to command 2.

| file | content |
|---|---|
| `<type>_delta.csv` | layer x `<component>_delta_<type>_<base>`: the reference's layout and names |
| `norms.csv` | tidy: `model,layer,component,tensor,norm,params`, one row per measured tensor and model |
| `manifest.json` | versions, models, sample ids, options, hashes; written last |

A folder that holds only delta CSVs (from the reference, or edited by hand) can be read too, with a warning.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, raise_collected
from utils.publish import MANIFEST, file_sha256

if TYPE_CHECKING:
    import pandas as pd

NORMS = "norms.csv"
NORM_COLUMNS = ("model", "layer", "component", "tensor", "norm", "params")
DELTA_SUFFIX = "_delta.csv"


@dataclass(frozen=True)
class Measurements:
    """A dataframe folder in memory.

    `deltas` maps each expert's type to a frame with one row per layer and one column per component (plain component
    names), the normalized deltas. `norms` (columns `NORM_COLUMNS`) and `manifest` are None for a folder of bare CSVs.
    `warnings` says, in sentences, what could not be checked or does not match.
    """

    folder: Path
    deltas: Mapping[str, "pd.DataFrame"]
    norms: "pd.DataFrame | None"
    manifest: Mapping[str, Any] | None
    warnings: tuple[str, ...]


def delta_file(model_type: str) -> str:
    """The file name of an expert's delta table."""
    return f"{model_type}{DELTA_SUFFIX}"


def delta_column(component: str, model_type: str, base_type: str) -> str:
    """The reference's column name for one component of one expert."""
    return f"{component}_delta_{model_type}_{base_type}"


def csv_bytes(frame: "pd.DataFrame") -> bytes:
    """A frame as CSV: no index, shortest text that reads back to the same float64, `\\n` line ends."""
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue().encode()


def measurement_files(
    deltas: Mapping[str, "pd.DataFrame"], norms: "pd.DataFrame", base_type: str, manifest: Mapping[str, Any]
) -> dict[str, bytes]:
    """The content of a dataframe folder by file name, the manifest (which gains the hashes of the others) last.

    Args:
        deltas: per expert type, layer x component.
        norms: tidy norms with the columns `NORM_COLUMNS`.
        base_type: the base's type, part of the column names.
        manifest: everything the manifest says but the hashes.
    """
    files = {}
    for model_type, frame in deltas.items():
        named = frame.rename(columns=lambda name, model_type=model_type: delta_column(name, model_type, base_type))
        files[delta_file(model_type)] = csv_bytes(named)
    files[NORMS] = csv_bytes(norms[list(NORM_COLUMNS)])
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
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


def read_measurements(
    folder: Path, expert_types: Sequence[str], base_type: str, components: Sequence[str] | None
) -> Measurements:
    """Read and check a dataframe folder.

    Args:
        folder: the folder that command 1 wrote, or one of bare delta CSVs.
        expert_types: the experts to merge, from the pair config.
        base_type: the base's type.
        components: the config's components, or None for `auto` (every component in the files).

    Raises:
        UserError: the folder or a CSV is missing, a CSV belongs to no expert of the config, or columns, rows or values
            are missing, duplicated, not finite or negative. All problems are reported together.
    """
    if not folder.is_dir():
        raise UserError(f"--delta_dfs_in_dir {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    manifest = read_manifest(folder)
    warnings = [] if manifest else [_NO_MANIFEST.format(folder=folder)]
    wanted = {delta_file(model_type): model_type for model_type in expert_types}
    problems = [
        f"{path.name} belongs to no expert of the config (types: {', '.join(expert_types)}); move it away"
        for path in sorted(folder.glob(f"*{DELTA_SUFFIX}"))
        if path.name not in wanted
    ]
    deltas = {}
    for name, model_type in wanted.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing; run lewis_importance.py with this config first")
            continue
        frame, found = _read_deltas(folder / name, model_type, base_type, components)
        problems += found
        deltas[model_type] = frame
    raise_collected(problems, f"dataframe folder {folder}")
    _same_shape(folder, deltas)
    norms, norm_warnings = _read_norms(folder, manifest is not None)
    if manifest:
        warnings += _hash_warnings(folder, manifest, wanted)
    return Measurements(folder, deltas, norms, manifest, (*warnings, *norm_warnings))


_NO_MANIFEST = (
    "{folder} has no manifest.json (it was written by the reference, by hand, or by a run that was killed): which "
    "models, samples and options these numbers come from cannot be checked"
)


def _read_deltas(
    path: Path, model_type: str, base_type: str, components: Sequence[str] | None
) -> tuple["pd.DataFrame", list[str]]:
    import pandas as pd

    raw = _read_csv(path)
    suffix = delta_column("", model_type, base_type)
    problems = []
    if components is None:
        named = {column: column.removesuffix(suffix) for column in raw.columns if column.endswith(suffix)}
    else:
        named = {delta_column(component, model_type, base_type): component for component in components}
    unknown = [str(column) for column in raw.columns if column not in named]
    absent = [column for column in named if column not in raw.columns]
    if absent or unknown or not named:
        problems.append(
            f"{path.name}: columns must be <component>{suffix}"
            + (f"; missing: {', '.join(absent)}" if absent else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
        return pd.DataFrame(), problems
    if raw.empty:
        return pd.DataFrame(), [f"{path.name} has no rows; it needs one per decoder block"]
    frame = raw[list(named)].rename(columns=named)
    for component in frame.columns:
        values = pd.to_numeric(frame[component], errors="coerce").astype("float64")
        bad = values.isna() | values.isin([float("inf")]) | (values < 0)
        if bad.any():
            row = int(bad.idxmax())
            shown = frame[component].iloc[row]
            problems.append(
                f"{path.name}: column {delta_column(component, model_type, base_type)}, layer {row}: {shown!r} is not "
                "a finite number of at least 0"
            )
        frame[component] = values
    return frame, problems


def _read_csv(path: Path) -> "pd.DataFrame":
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


def _same_shape(folder: Path, deltas: Mapping[str, "pd.DataFrame"]) -> None:
    shapes = {model_type: frame.shape for model_type, frame in deltas.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{delta_file(key)}: {rows} layers x {columns}" for key, (rows, columns) in shapes.items())
        raise UserError(f"dataframe folder {folder}: the experts' tables differ in shape ({listed}); a row is missing")


def _read_norms(folder: Path, expected: bool) -> tuple["pd.DataFrame | None", list[str]]:
    path = folder / NORMS
    if not path.exists():
        return None, [f"{path} is missing: tensor names and sizes come from elsewhere"] if expected else []
    norms = _read_csv(path)
    if list(norms.columns) != list(NORM_COLUMNS):
        raise UserError(f"{path}: columns must be {','.join(NORM_COLUMNS)}, got {','.join(map(str, norms.columns))}")
    return norms, []


def _hash_warnings(folder: Path, manifest: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    recorded = manifest.get("files", {})
    return [
        f"{name} differs from what manifest.json recorded (edited since?); it is used as it is"
        for name in (*names, NORMS)
        if name in recorded and (folder / name).exists() and file_sha256(folder / name) != recorded[name]
    ]
