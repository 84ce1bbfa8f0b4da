"""What a merge was asked for, as one hash: two runs with the same hash make the same folder."""

from collections.abc import Iterable
from pathlib import Path

from utils.merging.planning import PlannedMerge
from utils.models.checkpoints import weight_file_record
from utils.models.tokenizer_files import copied_names
from utils.publishing.manifest import MANIFEST, file_sha256, sha256_of
from utils.publishing.staging import Stamp, stamp
from utils.runtime import sources_sha256, versions


def request_hash(ready: PlannedMerge) -> str:
    """SHA-256 over everything that the result of a planned merge depends on.

    That is the recipe, the flags, the versions, the device, and of every input the place, sizes, times and headers of its
    weights and the small files; no weights are read.
    """
    plan, settings = ready.plan, ready.settings
    inputs = [
        {
            **weight_file_record(model.checkpoint),
            "folder": str(model.checkpoint.folder),
            "small": _small_files(model.checkpoint.folder),
        }
        for model in plan.inputs.models
    ]
    asked = {
        "recipe": ready.recipe.sha256,
        "options": settings.asked(),
        "evaluation": _evaluation(settings.evaluation),
        "versions": versions(),
        "device": ready.device,
        "origin": ready.origin.as_data() if ready.origin else None,
        "inputs": inputs,
        "beside": _stamps(plan.inputs.donor.checkpoint.folder, ready.copied),
        "token_donors": [[str(folder), _small_files(folder)] for folder in ready.token_donors],
        "saliency": [[file.label, file.sha256] for file in ready.saliency],
    }
    return sha256_of(asked)


def work_key(request: str) -> str:
    """What unfinished work on a request is known by: that and this project's code, since no other code goes on with it."""
    return sha256_of([request, sources_sha256()])


def _small_files(folder: Path) -> dict[str, Stamp]:
    names = ["config.json", "README.md", *copied_names(folder)]  # the card has the license of their cards
    return _stamps(folder, names)


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, Stamp]:
    return {name: stamp(folder / name) for name in names if (folder / name).is_file()}


def _evaluation(folder: Path | None) -> str | None:
    if folder is None:
        return None
    manifest = folder / MANIFEST  # without one the scores can still be shown
    return file_sha256(manifest if manifest.is_file() else folder / "scores.csv")
