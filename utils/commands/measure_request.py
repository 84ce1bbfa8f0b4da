"""What a measurement depends on, as its manifest records it, and whether a folder holds that already."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands.measure_options import MeasureOptions
from utils.errors import UserError
from utils.guidance.folder import COMMAND, read_manifest
from utils.guidance.measure_job import MeasureJob
from utils.guidance.text_gain import ACCEPT
from utils.models.checkpoints import weight_file_record
from utils.models.content_sample import content_sample
from utils.models.settings_digest import settings_digest
from utils.pair.calibration import with_defaults
from utils.pair.source import CalibrationSource
from utils.pair.tokens import token_digest
from utils.passes.preparation import Samples
from utils.passes.subjects import Subject
from utils.publishing.manifest import file_sha256
from utils.runtime import sources_sha256, versions
from utils.workers.work_folder import folder_name

if TYPE_CHECKING:
    from utils.workers.ray_cluster import RayWorkers


def measure_request(options: MeasureOptions, job: MeasureJob, samples: Samples) -> dict[str, Any]:
    """Everything the result depends on, as the manifest records it."""
    texts = [_text_record(source, [sample.row for sample in chosen]) for source, chosen in samples.items()]
    return {
        "command": COMMAND,
        "guidance": options.method.name,
        "guidance_options": dict(options.method_options),
        "versions": versions(),
        "options": options.config.options(),
        "device": job.devices[0].type,
        "micro_batch_tokens": options.micro_batch_tokens,
        "samples": texts[0] if len(texts) == 1 else texts,
        "models": [
            {
                "type": subject.entry.type,
                **weight_file_record(subject.checkpoint),
                "sample_sha256": content_sample(subject.checkpoint),
                "settings_sha256": settings_digest(subject.checkpoint),
                "dtype": str(subject.dtype).removeprefix("torch."),
                "tokens": sum(text.tokens for text in subject.texts.values()),
                "token_sha256": token_digest([ids for text in subject.texts.values() for ids in text.encoded]),
            }
            for subject in job.subjects
        ],
        **_routers(job.base),
        **_other_inputs(options),
        **options.method.depends_on(job),
    }


def _routers(base: Subject) -> dict[str, Any]:
    """The stored names of the routers, of a mixture: where the models are not at hand, command 2 knows them from here."""
    from utils.models.routers import stored_routers

    found = stored_routers(base.decoder.model, base.layout, f"model {base.entry.name}")
    return {"routers": found} if found else {}


def refuse_missing_files(options: MeasureOptions) -> None:
    """Raise a `UserError` if a flag of the method names a file that is none."""
    for flag in options.method.file_flags:
        named = options.method_options.get(flag)
        if named and not Path(named).is_file():
            state, code = (
                ("is a folder", "file-is-folder") if Path(named).is_dir() else ("does not exist", "file-missing")
            )
            raise UserError(f"--{flag} {named} {state}; give the file", code)


def _other_inputs(options: MeasureOptions) -> dict[str, Any]:
    """The records of files that the method's own flags name, by flag."""
    named = options.method_options
    found = {flag: {"sha256": file_sha256(Path(named[flag]))} for flag in options.method.file_flags if named.get(flag)}
    return {"other_inputs": found} if found else {}


def pieces_request(job: MeasureJob, workers: "RayWorkers | None", request: Mapping[str, Any]) -> dict[str, Any]:
    """What the bits of the pieces' results depend on, beside the request: this project's code, too, and with it the form that
    unfinished ones have.

    They do not depend on whether useless text is accepted, so that accepting it goes on with what is finished; without that,
    every method refuses what a run that accepted it has left (`refuse_useless_text`).
    """
    import torch

    threads = torch.get_num_threads() if workers is None else workers.cpus
    options = {name: value for name, value in request["guidance_options"].items() if name != ACCEPT}
    own = {"guidance_options": options, "sources": sources_sha256()}
    if workers is None:
        own["experts_apart"] = [subject.experts_apart for subject in job.subjects]
        own["shares"] = (job.shares or job.side_by_side) if job.devices[0].type == "cpu" else None
    return {**request, **own, "threads": threads, "batches_a_piece": job.batches_a_piece}


def as_begun(
    place: Path, job: MeasureJob, workers: "RayWorkers | None", request: Mapping[str, Any]
) -> tuple[MeasureJob, dict[str, Any]]:
    """The job and the request of its pieces as an interrupted run in `place` had them; without one, as they are.

    How many models go side by side, and share a CPU's threads, depends on the memory that is free, and so does whether experts
    of mixtures are fetched one at a time. The last bits of what is finished depend on it, so that the rest is done in that way,
    too.
    """
    for begun in _ways(job) if workers is None and place.is_dir() else ():
        found = pieces_request(begun, workers, request)
        if (place / folder_name(found)).is_dir():
            return begun, found
    return job, pieces_request(job, workers, request)


def _ways(job: MeasureJob) -> Iterator[MeasureJob]:
    """The job as it is, and as it may have been begun while more memory or less was free."""
    on_cpu = job.devices[0].type == "cpu"
    for subjects in (job.subjects, tuple(replace(one, experts_apart=True) for one in job.subjects)):
        yield replace(job, subjects=subjects)
        for shares in range(1, max(len(subjects), job.side_by_side) + 1) if on_cpu else ():
            yield replace(job, subjects=subjects, shares=shares, at_once=min(job.at_once, shares))


def _text_record(source: CalibrationSource, rows: Sequence[int]) -> dict[str, Any]:
    full = with_defaults(source)
    return {"path": full.path, "subset": full.subset, "split": full.split, "seed": full.seed, "rows": list(rows)}


def already_there(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether the folder's manifest records this very request and its files are as it recorded them."""
    manifest = read_manifest(folder)
    if not manifest or {key: value for key, value in manifest.items() if key != "files"} != request:
        return False
    recorded = manifest.get("files")
    return (
        isinstance(recorded, dict)
        and bool(recorded)
        and all((folder / name).exists() and file_sha256(folder / name) == digest for name, digest in recorded.items())
    )


def refuse_changed(subjects: Sequence[Subject], request: Mapping[str, Any]) -> None:
    """Raise a `UserError` if weights are not what the request says they were before they were read."""
    for subject in _changed(subjects, request):
        raise UserError(
            f"model {subject.entry.name}: its weight files changed while they were measured; measure again",
            "model-changed",
        )


def not_changed(subjects: Sequence[Subject], request: Mapping[str, Any]) -> bool:
    """Whether the request can be made again: weights are what it says, or cannot be looked at now."""
    try:
        return not any(True for _ in _changed(subjects, request))
    except (OSError, UserError):
        return True


def _changed(subjects: Sequence[Subject], request: Mapping[str, Any]) -> Iterator[Subject]:
    for subject, recorded in zip(subjects, request["models"], strict=True):
        if any(recorded[key] != value for key, value in weight_file_record(subject.checkpoint).items()):
            yield subject
