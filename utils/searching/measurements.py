"""The dataframe folders a search can use: those it is told of, or those that lie beside its own folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import UserError, is_of_the_moment
from utils.evaluation.seen_rows import refuse_measured_rows
from utils.evaluation.tasks import Task
from utils.guidance.folder import read_manifest
from utils.guidance.measured_pair import MeasuredPair, open_measured
from utils.guidance.method import DEFAULT, guidance_methods
from utils.pair.config import PairConfig
from utils.publishing.manifest import MANIFEST
from utils.searching.study import stored_beginning

FOLDER = "measurements"  # in a search's folder: what it measured itself


def find_measurements(
    config: PairConfig,
    named: Sequence[str] | None,
    out_dir: Path,
    *,
    trust_remote_code: bool,
    tasks: Sequence[Task] = (),
) -> tuple[dict[str, MeasuredPair], list[str]]:
    """Open the measurements of a pair, one by guidance method.

    Args:
        config: the pair.
        named: folders the user named; None: what the search measured itself, the folders beside `out_dir`, and what
            searches beside it measured; of the latter two only what its study began with, once there is one.
        out_dir: the search's folder.
        trust_remote_code: let a checkpoint's config load code from its folder.
        tasks: what recipes are scored on; what was measured on rows of these cannot be used.

    Returns:
        The measurements by guidance, in the order of the methods; sentences about what was left out or does not match.

    Raises:
        UserError: a named folder is missing, of another pair or measured on rows of a task, or two named ones are of one
            guidance.
    """
    found: dict[str, MeasuredPair] = {}
    notes: list[str] = []
    study = stored_beginning(out_dir) if named is None else None
    began = None if study is None else study.measurements
    for folder in _folders(named, out_dir):
        try:
            guidance = _guidance(folder, is_named=named is not None)
            if guidance is None:
                continue
            method = guidance_methods()[guidance]
            others = began is not None and folder.parent != out_dir / FOLDER
            if others and guidance not in began:
                continue
            measured = open_measured(config, method, folder, trust_remote_code=trust_remote_code)
            if others and identity({guidance: measured})[guidance] != began[guidance]:
                continue
            refuse_measured_rows(tasks, (measured.manifest or {}).get("samples"), f"measurement {folder}")
        except UserError as error:
            if named is not None or is_of_the_moment(error):
                raise
            notes.append(f"{folder} is left out: {error}")
            continue
        if guidance not in found:
            found[guidance] = measured
        elif named is not None:
            raise UserError(
                f"search.measurements: {found[guidance].folder} and {folder} both hold what {guidance} measured; name one",
                "search-measured-twice",
            )
        else:
            notes.append(f"{folder} is left out: {found[guidance].folder} holds what {guidance} measured, too")
    notes += [f"{one.folder}: {warning}" for one in found.values() for warning in one.warnings]
    return {name: found[name] for name in guidance_methods() if name in found}, notes


def identity(measured: Mapping[str, MeasuredPair]) -> dict[str, str]:
    """What tells measurements apart: the hash of each one's manifest, or of its tables where there is none."""
    return {name: one.sha256 or str(one.folder.resolve()) for name, one in measured.items()}


def _folders(named: Sequence[str] | None, out_dir: Path) -> list[Path]:
    if named is not None:
        return [Path(name).expanduser() for name in named]
    beside = out_dir.resolve().parent
    others = [path / FOLDER for path in _inside(beside) if path != out_dir.resolve()]
    places = [out_dir / FOLDER, beside, *others]
    return [path for place in places for path in _inside(place) if os.path.isfile(path / MANIFEST)]


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder, in name order; nothing if it is none, or is somebody's who lets nobody look."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _guidance(folder: Path, *, is_named: bool) -> str | None:
    """The guidance method that filled a folder; None if it is something else's folder."""
    if not folder.is_dir():
        raise UserError(f"search.measurements: {folder} is no folder", "search-no-measurement")
    manifest = read_manifest(folder)
    if manifest is None:
        return DEFAULT  # bare tables of the reference
    guidance = manifest.get("guidance")
    if manifest.get("command") == "lewis_importance" and guidance in guidance_methods():
        return guidance
    if is_named:
        raise UserError(
            f"search.measurements: {folder} holds nothing that lewis_importance.py of this version measured",
            "search-no-measurement",
        )
    return None
