"""LEWIS's part of the dataframe folder, in the reference's layout.

| file | content |
|---|---|
| `<type>_delta.csv` | layer x `<component>_delta_<type>_<base>`: the reference's layout and names |
| `norms.csv` | tidy: `model,layer,component,tensor,norm,params`, one row per measured tensor and model |

Where experts have texts of their own, `norms.csv` has a last column `text`: the expert on whose text a norm was taken.
A folder that holds only delta CSVs (from the reference, or edited by hand) can be read too, with a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.errors import UserError, raise_collected
from utils.guidance.csv_files import csv_bytes, read_csv
from utils.guidance.lewis.method import DELTA_SUFFIX, NORMS, delta_file

NORM_COLUMNS = ("model", "layer", "component", "tensor", "norm", "params")
TEXT = "text"


@dataclass(frozen=True)
class Measurements:
    """A dataframe folder in memory.

    `deltas` maps each expert's type to a frame with one row per layer and one column per component (plain component
    names), the normalized deltas. `norms` (columns `NORM_COLUMNS`) is None for a folder of bare CSVs. `warnings` says, in
    sentences, what could not be checked.
    """

    folder: Path
    deltas: Mapping[str, pd.DataFrame]
    norms: pd.DataFrame | None
    warnings: tuple[str, ...]


def delta_column(component: str, model_type: str, base_type: str) -> str:
    """The reference's column name for one component of one expert."""
    return f"{component}_delta_{model_type}_{base_type}"


def table_files(deltas: Mapping[str, pd.DataFrame], norms: pd.DataFrame, base_type: str) -> dict[str, bytes]:
    """The delta tables and the norms as CSV, by file name.

    Args:
        deltas: per expert type, layer x component.
        norms: tidy norms with the columns `NORM_COLUMNS`, and perhaps `text`.
        base_type: the base's type, part of the column names.
    """
    files = {}
    for model_type, frame in deltas.items():
        named = frame.rename(columns=lambda name, model_type=model_type: delta_column(name, model_type, base_type))
        files[delta_file(model_type)] = csv_bytes(named)
    files[NORMS] = csv_bytes(norms[[*NORM_COLUMNS, *([TEXT] if TEXT in norms.columns else [])]])
    return files


def read_measurements(
    folder: Path,
    expert_types: Sequence[str],
    base_type: str,
    components: Sequence[str] | None,
    *,
    has_norms: bool = False,
) -> Measurements:
    """Read and check a dataframe folder.

    Args:
        folder: the folder that command 1 wrote, or one of bare delta CSVs.
        expert_types: the experts to merge, from the pair config.
        base_type: the base's type.
        components: the config's components, or None for `auto` (every component in the files).
        has_norms: whether norms.csv should be there; if it is not, a warning says so.

    Raises:
        UserError: the folder or a CSV is missing, a CSV belongs to no expert of the config, or columns, rows or values
            are missing, duplicated, not finite or negative. All problems are reported together.
    """
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
    norms, warnings = _read_norms(folder, has_norms)
    return Measurements(folder, deltas, norms, tuple(warnings))


def _read_deltas(
    path: Path, model_type: str, base_type: str, components: Sequence[str] | None
) -> tuple[pd.DataFrame, list[str]]:
    raw = read_csv(path)
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


def _same_shape(folder: Path, deltas: Mapping[str, pd.DataFrame]) -> None:
    shapes = {model_type: frame.shape for model_type, frame in deltas.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{delta_file(key)}: {rows} layers x {columns}" for key, (rows, columns) in shapes.items())
        raise UserError(f"dataframe folder {folder}: the experts' tables differ in shape ({listed}); a row is missing")


def _read_norms(folder: Path, expected: bool) -> tuple[pd.DataFrame | None, list[str]]:
    path = folder / NORMS
    if not path.exists():
        return None, [f"{path} is missing: tensor names and sizes come from elsewhere"] if expected else []
    norms = read_csv(path)
    if list(norms.columns) not in (list(NORM_COLUMNS), [*NORM_COLUMNS, TEXT]):
        raise UserError(f"{path}: columns must be {','.join(NORM_COLUMNS)}, got {','.join(map(str, norms.columns))}")
    return norms, []
