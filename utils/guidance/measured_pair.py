"""What was measured of a pair, opened once: the dataframe folder, its manifest, and the models that lie on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.guidance.folder import check_folder, read_manifest, refuse_edited
from utils.guidance.measure_job import ROUTING
from utils.guidance.method import GuidanceMethod
from utils.guidance.provenance import changed_checkpoints, compare_with_manifest
from utils.pair.config import PairConfig
from utils.publishing.files import half_published
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.recipes.naming import LocalModels


@dataclass(frozen=True)
class MeasuredPair:
    """A dataframe folder that belongs to a pair config.

    `manifest` is what the folder says of itself, `sha256` the hash of that file; both None for a folder of bare tables.
    `warnings` are sentences about what could not be checked or does not match.
    """

    config: PairConfig
    folder: Path
    manifest: Mapping[str, Any] | None
    sha256: str | None
    models: LocalModels
    warnings: tuple[str, ...]

    def option(self, name: str) -> Any:
        """The value of a flag of the method that the pair was measured with; None where the folder does not say."""
        options = (self.manifest or {}).get("guidance_options")
        return options.get(name) if isinstance(options, dict) else None


def open_measured(
    config: PairConfig,
    method: GuidanceMethod,
    folder: Path,
    *,
    trust_remote_code: bool = False,
    accept_edited: bool = False,
) -> MeasuredPair:
    """Open what a method measured of a pair. Tables and weights are not read, nothing is downloaded.

    Args:
        config: the pair config.
        method: the guidance method.
        folder: the dataframe folder.
        trust_remote_code: let a checkpoint's config load code from its folder.
        accept_edited: take files and weights that differ from what the folder's manifest recorded.

    Raises:
        UserError: no such folder; another method, another base or other experts were measured; files that were edited
            since; weights of a local model are others; one is malformed.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    check_folder(folder, manifest, method.name)
    if half_published(folder):
        raise UserError(
            f"--delta_dfs_in_dir {folder}: a run of lewis_importance.py was killed while it put its files there, so those "
            "of two measurements may lie side by side; type that command again, which puts the others in their places",
            "dataframes-half-published",
        )
    experts = config.experts_to_merge
    warnings = [] if manifest else [_NO_MANIFEST.format(folder=folder)]
    warnings += compare_with_manifest(config, experts, manifest)
    warnings += refuse_edited(folder, manifest, (*method.files(config), ROUTING), accepted=accept_edited)
    models = LocalModels(config.base, experts, trust_remote_code=trust_remote_code)
    warnings += changed_checkpoints(manifest, models, accepted=accept_edited)
    sha256 = None if manifest is None else file_sha256(folder / MANIFEST)
    return MeasuredPair(config, folder, manifest, sha256, models, tuple(warnings))


_NO_MANIFEST = (
    "{folder} has no manifest.json (it was written by the reference, by hand, or by a run that was killed): which "
    "models, samples and options these numbers come from cannot be checked"
)
