"""What lies in a search's folder: files that a search wrote, and those that it must not replace."""

from pathlib import Path

from utils.bounded_files import read_json
from utils.commands.search_options import COMMAND, FILES
from utils.errors import UserError
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.publishing.target import refuse_existing

OUTDATED = (
    "outdated"  # key of the manifest: files of the earlier result without a successor, which are removed behind it
)


def written_by_a_search(folder: Path) -> dict[str, str]:
    """The files that an earlier search published here, with their SHA-256, and those it was about to remove when it ended;
    none without its manifest."""
    try:
        earlier = read_json(folder / MANIFEST, MANIFEST)
    except UserError:
        return {}
    if earlier.get("command") != COMMAND:
        return {}
    parts = [part for key in (OUTDATED, "files") if isinstance(part := earlier.get(key), dict)]
    return {Path(name).name: str(digest) for part in parts for name, digest in part.items()}


def refuse_edited(folder: Path) -> None:
    """Refuse to search where a file that the end would replace is not as a search has written it.

    Raises:
        UserError: somebody changed it, or put it there.
    """
    written = written_by_a_search(folder)
    present = [name for name in FILES if (folder / name).is_file() and not (name == MANIFEST and written)]
    edited = [name for name in present if file_sha256(folder / name) != written.get(name)]
    if edited:
        raise UserError(
            f"{folder}: {', '.join(edited)} changed since a search wrote it, or was put there; the search ends with files of "
            "these names: move it to another place (or name) first",
            "search-edited-result",
        )
    refuse_existing(folder, [name for name in FILES if name not in present], overwrite=True)  # folders of these names
