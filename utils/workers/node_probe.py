"""What every machine of a cluster has to have in common, looked at before any work: versions, this code, shared folders.

`look` runs on each machine; it uses the standard library alone, since this project may not be there. It takes from this
file nothing but itself: it is sent by value.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import Problem, raise_collected
from utils.runtime import PACKAGES, versions

ROOT = Path(__file__).resolve().parents[2]
_MARK = ".seen_by_all.part"


@dataclass(frozen=True)
class Shared:
    """What has to be the same everywhere: folders by what to call them, each with the sizes of its files of interest.

    `mark` is a file of this run, with `content`: whoever reads that sees the same folder, not one of the same name. Paths
    that are no whole ones begin in this process's folder: machines begin in another one, wherever `ray start` was typed.
    """

    folders: Mapping[str, Mapping[str, int]]
    mark: Path
    content: str


def looking() -> Callable[..., dict[str, Any]]:
    """The function to run on a machine; it is defined in here so that it is sent as it is, not as a name to import."""

    def look(
        root: str, packages: Sequence[str], folders: Mapping[str, Mapping[str, int]], mark: str, cwd: str
    ) -> dict[str, Any]:
        import hashlib
        import os
        import platform
        from importlib import metadata
        from pathlib import Path

        def version(package: str) -> str:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                return "not installed"

        digest = hashlib.sha256()
        for path in sorted(Path(root, "utils").rglob("*.py")):
            digest.update(f"{path.relative_to(root)}:".encode() + path.read_bytes())
        try:
            content = Path(cwd, mark).read_text(encoding="utf-8")
        except OSError:
            content = None
        return {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "code": digest.hexdigest(),
            "mark": content,
            "cwd": os.path.isdir(cwd),
            "unseen": [
                os.path.join(folder, name)
                for folder, files in folders.items()
                for name, size in {"": None, **files}.items()
                if not os.path.exists(os.path.join(cwd, folder, name))
                or (size is not None and os.path.getsize(os.path.join(cwd, folder, name)) != size)
            ],
        }

    return look


def arguments(shared: Shared) -> tuple[Any, ...]:
    """What `look` is called with."""
    return str(ROOT), PACKAGES, dict(shared.folders), str(shared.mark), os.getcwd()


def shared_places(work_folder: Path, models: Mapping[Path, Sequence[Path]]) -> Shared:
    """Mark the work folder for a look.

    Args:
        work_folder: where results will lie.
        models: the files of weights by model folder.
    """
    mark, content = work_folder / _MARK, hashlib.sha256(os.urandom(32)).hexdigest()
    mark.write_text(content, encoding="utf-8")
    folders = {str(folder): {path.name: path.stat().st_size for path in files} for folder, files in models.items()}
    return Shared(folders, mark, content)


def refuse_unlike(found: Mapping[str, Mapping[str, Any]], shared: Shared, here: Mapping[str, Any]) -> None:
    """Refuse machines that cannot do the work as this one would, all in one message.

    Args:
        found: what `look` saw, by machine.
        shared: what was looked for.
        here: what it sees on this machine.

    Raises:
        UserError: a machine with other versions or other code, or one that does not see a folder.
    """
    problems = []
    for machine, one in found.items():
        if not one["cwd"] or one["mark"] != shared.content:
            place = Path(shared.mark).parent if one["cwd"] else os.getcwd()
            problems.append(
                Problem(
                    f"{machine} does not see {place}: put it into a folder that all machines share, under the same path",
                    "workers-folder-unseen",
                )
            )
        elif one["unseen"]:
            problems.append(
                Problem(
                    f"{machine} does not see {one['unseen'][0]} as it is here: put the models into a folder that all "
                    "machines share, under the same path",
                    "workers-folder-unseen",
                )
            )
        ours = versions()
        for package, version in one["versions"].items():
            if _counts(package, version) != _counts(package, ours[package]):
                problems.append(
                    Problem(
                        f"{machine} has {package} {version}, here it is {ours[package]}: install the same there",
                        "workers-versions-differ",
                    )
                )
        if one["code"] != here["code"]:
            problems.append(
                Problem(
                    f"{machine} has other files than {ROOT / 'utils'} here: put this project into a folder that all "
                    "machines share, under the same path",
                    "workers-code-differs",
                )
            )
    raise_collected(problems, "the machines of the cluster are not alike")


def _counts(package: str, version: str) -> str:
    """What of a version has to be the same: of Python's the first two numbers."""
    return ".".join(version.split(".")[:2]) if package == "python" else version
