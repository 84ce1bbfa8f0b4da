"""A merged folder checked against its manifest, byte by byte."""

from pathlib import Path

from utils.errors import Problem, UserError, raise_collected
from utils.merging.result_files import deviations, read_result_manifest
from utils.publishing.manifest import MANIFEST


def verify(folder: Path) -> None:
    """Compare every file of a merged folder with the SHA-256 that the manifest recorded, and print that they agree.

    Raises:
        UserError: there is no manifest of a merge; each file that deviates, is missing or was not written by the merge.
    """
    manifest = read_result_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        text = f"--verify {folder}: there is no {MANIFEST} of a merge; give a folder that utils/merger.py made"
        raise UserError(text, "verify-no-manifest")
    found = deviations(folder, manifest, every_byte=True)
    raise_collected((Problem(one.text, "verify-deviation") for one in found), f"--verify {folder}")
    print(
        f"{folder}: {len(manifest['files'])} files have the SHA-256 that {MANIFEST} recorded, and there are no others"
    )
