"""What was measured laid out as a dataframe folder, for a *decide* half that goes on from it in the same run."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def put_files(files: Mapping[str, bytes | Path], folder: Path) -> None:
    """Put contents under their names into a folder: bytes, and files of pieces, not copied where the file system can do
    without."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
            continue
        try:
            os.link(content, folder / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(content, folder / name)
