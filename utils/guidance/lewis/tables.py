"""LEWIS's part of the dataframe folder, in the reference's layout.

| file | content |
|---|---|
| `<type>_delta.csv` | layer x `<component>_delta_<type>_<base>`: the reference's layout and names |
| `lewis_noise.csv` | expert, layer and component: the share of the delta that is rounding (`noise.py`); no rows in float32 |
| `norms.csv` | tidy: `model,layer,component,tensor,norm,params`, one row per measured tensor and model |

Where a component is in some blocks only, its other cells are empty. Of a mixture, each expert's matrices are components
of their own where the checkpoint stores them so, and `norms.csv` has a column `tokens`: how many it was measured on. Where
experts have texts of their own, it has a last column `text`: the expert on whose text a norm was taken.
A folder that holds only delta CSVs (from the reference, or edited by hand) can be read too, with a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.errors import Problem, raise_collected
from utils.guidance.columns import TableFormat, checked, expert, number, read_tables, text, whole
from utils.guidance.csv_files import MISSING, csv_bytes, read_csv
from utils.guidance.lewis.method import DELTA_SUFFIX, NOISE, NORMS, delta_file

TEXT, TOKENS = "text", "tokens"
NORM_TABLE = TableFormat(
    NORMS,
    (text("model"), whole("layer"), text("component"), text("tensor"), number("norm"), whole("params", 1)),
    key=("model", TEXT, "layer", "component"),
    last=(whole(TOKENS), text(TEXT)),
)

NOISE_TABLE = TableFormat(
    NOISE,
    (expert("model"), whole("layer"), text("component"), number("noise")),
    key=("model", "layer", "component"),
    may_be_empty=True,
)


@dataclass(frozen=True)
class Measurements:
    """A dataframe folder in memory.

    `deltas` maps each expert's type to a frame with one row per layer and one column per component (plain component
    names), the normalized deltas. `norms` (columns of `NORM_TABLE`) is None for a folder of bare CSVs. `warnings` says, in
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
        norms: tidy norms with the columns of `NORM_TABLE`, with `text` or without.
        base_type: the base's type, part of the column names.
    """
    files = {}
    for model_type, frame in deltas.items():
        named = frame.rename(columns=lambda name, model_type=model_type: delta_column(name, model_type, base_type))
        files[delta_file(model_type)] = csv_bytes(named)
    files[NORMS] = csv_bytes(norms[[*NORM_TABLE.names, *(name for name in (TOKENS, TEXT) if name in norms.columns)]])
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
        UserError: a CSV is missing or belongs to no expert of the config; columns, rows or values are missing, given
            twice, not finite or negative. The message names the file that lacks a row.
    """
    wanted = {delta_file(model_type): model_type for model_type in expert_types}
    norms, warnings = None, []
    if (folder / NORMS).exists():
        (norms,) = read_tables(folder, [NORM_TABLE], ())
        if TOKENS in norms.columns and components is not None:  # a component of stacked experts is many columns
            components = list(dict.fromkeys(norms["component"]))
    elif has_norms:
        warnings.append(f"{folder / NORMS} is missing: tensor names and sizes come from elsewhere")
    problems = [
        Problem(
            f"{path.name} belongs to no expert of the config (types: {', '.join(expert_types)}); move it away",
            "table-unknown-expert",
        )
        for path in sorted(folder.glob(f"*{DELTA_SUFFIX}"))
        if path.name not in wanted
    ]
    deltas = {}
    for name, model_type in wanted.items():
        if not (folder / name).exists():
            problems.append(Problem(f"{name} is missing; run lewis_importance.py with this config first", MISSING))
            continue
        deltas[model_type], found = _read_deltas(folder / name, model_type, base_type, components)
        problems += found
    raise_collected(problems, f"dataframe folder {folder}")
    raise_collected(
        [problem for name, frame in deltas.items() for problem in _lost_cells(delta_file(name), frame, norms)],
        f"dataframe folder {folder}",
    )
    raise_collected(_lost_rows(deltas, norms), f"dataframe folder {folder}")
    return Measurements(folder, deltas, norms, tuple(warnings))


def read_noise(folder: Path, experts: Sequence[str], known: Sequence[str]) -> pd.DataFrame:
    """The share of each delta that is rounding; no rows where the forward pass was in float32, or nobody looked.

    Args:
        folder: the dataframe folder.
        experts: those to merge.
        known: every expert of the pair config.

    Raises:
        UserError: as `read_tables`.
    """
    if not (folder / NOISE).exists():  # of the reference, or an earlier version
        return NOISE_TABLE.frame([])
    (table,) = read_tables(folder, [NOISE_TABLE], known)
    return table[table["model"].isin(experts)]


def _read_deltas(
    path: Path, model_type: str, base_type: str, components: Sequence[str] | None
) -> tuple[pd.DataFrame, list[Problem]]:
    raw = read_csv(path)
    suffix = delta_column("", model_type, base_type)
    if components is None:
        named = {column: column.removesuffix(suffix) for column in raw.columns if column.endswith(suffix)}
    else:
        named = {delta_column(component, model_type, base_type): component for component in components}
    unknown = [str(column) for column in raw.columns if column not in named]
    absent = [column for column in named if column not in raw.columns]
    if absent or unknown or not named:
        message = (
            f"{path.name}: columns must be <component>{suffix}"
            + (f"; missing: {', '.join(absent)}" if absent else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
        return raw, [Problem(message, "table-columns")]
    if raw.empty:
        return raw, [Problem(f"{path.name} has no rows; it needs one per decoder block", "table-no-rows")]
    frame, problems = checked(
        raw[list(named)], TableFormat(path.name, tuple(number(name, blank=True) for name in named))
    )
    return frame.rename(columns=named), problems


def _lost_cells(file: str, frame: pd.DataFrame, norms: pd.DataFrame | None) -> list[Problem]:
    """Empty cells of a delta table whose tensors were measured; and all of them where nothing says what was."""
    there = None if norms is None else set(zip(norms["layer"], norms["component"], strict=True))
    lost = [
        (layer, name)
        for name in frame.columns
        for layer in frame.index[frame[name].isna()]
        if there is None or (layer, name) in there
    ]
    return [
        Problem(
            f"{file}, line {layer + 2}: the cell of {name} is empty; every block that has the component needs a number",
            "table-bad-value",
        )
        for layer, name in lost[:5]
    ]


def _lost_rows(deltas: Mapping[str, pd.DataFrame], norms: pd.DataFrame | None) -> list[Problem]:
    """The files that have rows for fewer layers than another one: a row of theirs is missing."""
    layers = {delta_file(model_type): len(frame) for model_type, frame in deltas.items()}
    if norms is not None:
        layers[NORMS] = int(norms["layer"].max()) + 1
    deepest = max(layers, key=layers.__getitem__)
    return [
        Problem(
            f"{name} has rows for {count} layers, but {deepest} for {layers[deepest]}: a row is missing from {name}, or {deepest} "
            "has one too many; mend that, or measure again with --overwrite",
            "table-row-missing",
        )
        for name, count in layers.items()
        if count < layers[deepest]
    ]
