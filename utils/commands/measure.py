"""Command 1's one job: measure every model of a pair on the calibration text and publish the dataframe folder."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands import measure_report as report
from utils.commands.measure_options import MeasureOptions
from utils.commands.ray_flags import connected
from utils.errors import UserError
from utils.guidance.folder import folder_files, read_manifest
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import GuidanceMethod
from utils.models.checkpoints import (
    Checkpoint,
    find_small_files,
    open_checkpoint,
    read_model_config,
    weight_file_record,
)
from utils.models.model_trial import ModelTrial
from utils.pair.calibration import choose_samples, token_digest, with_defaults
from utils.pair.config import PairConfig
from utils.pair.presence import refuse_missing
from utils.pair.source import CalibrationSource
from utils.passes.preparation import Precision, Samples, prepare_subjects
from utils.passes.subjects import Subject, memory_estimate
from utils.publishing.files import publish_files, repair_folder
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing
from utils.runtime import (
    available_bytes,
    choose_devices,
    import_libraries,
    peak_gpu_memory,
    versions,
    versions_line,
)
from utils.workers.work_folder import folder_name, work_folder

if TYPE_CHECKING:
    import torch

    from utils.workers.ray_cluster import RayWorkers


WORK = ".measuring.part"  # in the output folder: results of pieces, until all are there
_BATCHES_A_PIECE = 8  # on a cluster: enough that reading a model's weights for them pays


def measure_pair(options: MeasureOptions, *, alone: bool = True) -> None:
    """Check everything that can be known without weights, measure every model, publish the dataframe folder.

    Args:
        options: what was asked for.
        alone: whether this is all that runs, so that the next command is named at the end.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    config, method = options.config, options.method
    method.check_experts(config, len(config.experts))
    names = [*method.files(config), MANIFEST]
    prepare_folder(options.out_dir, "--out_dir")
    mended = repair_folder(options.out_dir)
    report.warn([mended] if mended else [])
    _refuse_out_dir(options, names)
    refuse_missing(config)
    if options.ray is not None:
        options.ray.refuse_devices(options.device, options.devices)
    quiet_libraries()
    say = print if not options.quiet else lambda line: None
    trial = None if options.trust_remote_code else ModelTrial(_small_files(config))
    say(versions_line("torch", "transformers"))
    with connected(options.ray, say) as workers:
        _measure(options, workers, trial, names, say, alone)


def _measure(
    options: MeasureOptions,
    workers: "RayWorkers | None",
    trial: ModelTrial | None,
    names: Sequence[str],
    say: Callable[[str], None],
    alone: bool,
) -> None:
    config, method = options.config, options.method
    devices = _choose_devices(options, say) if workers is None else [workers.device]
    samples = {source: choose_samples(source, config.nsamples) for source in config.texts}
    if trial is not None:
        trial.check()
    precision = Precision(devices[0], options.dtype, options.micro_batch_tokens)
    subjects = tuple(prepare_subjects(_used(config, method), samples, precision, options.trust_remote_code))
    at_once = _at_once(options, subjects, devices[0])
    job = MeasureJob(
        config,
        subjects,
        tuple(devices),
        options.method_options,
        options.trust_remote_code,
        at_once,
        quiet=options.quiet,
        workers=workers,
        batches_a_piece=None if workers is None else _BATCHES_A_PIECE,
    )
    request = _request(options, job, samples)
    with contextlib.ExitStack() as stack:
        place, pieces_of = options.out_dir / WORK, _pieces_of(job, workers, request)
        same = (place / folder_name(pieces_of)).is_dir
        stack.enter_context(locked_folder(options.out_dir, is_same=same, say=say))
        if not options.overwrite:
            if _already_there(options.out_dir, request):
                shutil.rmtree(place, ignore_errors=True)  # of a run that was killed once all was published
                print(f"{options.out_dir} already holds exactly this measurement; nothing to do")
                if alone:
                    report.say_next(options)
                return
            refuse_existing(options.out_dir, names)
        for line in report.choices(options, job, samples):
            say(line)
        report.warn(report.doubts(options, job, _idle_keys(options)))
        start = time.perf_counter()
        if options.restart:
            shutil.rmtree(place, ignore_errors=True)
        elif place.is_dir():
            say(_left_over(place, pieces_of))
        keep = workers is not None
        workspace = stack.enter_context(work_folder(place, pieces_of, keep=keep, through_interrupts=True))
        if workers is not None:
            workers.refuse_unlike(workspace, {one.folder: one.files for one in _checkpoints(options, subjects)})
        measured = method.measure(replace(job, workspace=workspace))
        _refuse_changed(subjects, request)
        say(f"measured in {time.perf_counter() - start:.2f} s{peak_gpu_memory(devices if workers is None else [])}")
        for note in measured.notes:
            say(note)
        report.warn(measured.warnings)
        files = folder_files(measured.files, request)
        publish_files(options.out_dir, files, overwrite=options.overwrite, last=alone)
    print(("" if options.quiet else "\n") + "wrote " + ", ".join(str(options.out_dir / name) for name in files))
    if alone:
        report.say_next(options)


def _left_over(place: Path, request: Mapping[str, Any]) -> str:
    """A line about what a killed run has left."""
    folder = place / folder_name(request)
    done = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if not done:
        return f"removed what a killed run has left in {place.parent}"
    pieces = f"{len(done)} piece{'s' * (len(done) != 1)}"
    return f"resumed: {pieces} of the work had been finished by a run that was stopped"


def _small_files(config: PairConfig) -> Iterator[tuple[str, Path]]:
    """Name and folder of every model whose small files can be read; what is wrong with another is said in its turn."""
    for entry in config.model_info:
        with contextlib.suppress(UserError):
            folder = find_small_files(entry.name, entry.revision)
            read_model_config(folder, entry.name)
            yield entry.name, folder


_ONLY_SOME_USE = {
    "sparsity_ratio": 0.0,
    "parity": False,
    "components": None,
}  # keys, with the value that asks for nothing


def _used(config: PairConfig, method: GuidanceMethod) -> PairConfig:
    """The config without what the method has no use for."""
    idle = {key: value for key, value in _ONLY_SOME_USE.items() if key not in method.config_keys}
    return replace(config, **idle)


def _idle_keys(options: MeasureOptions) -> list[str]:
    """Keys that the config gives and the method has no use for."""
    return [
        key
        for key, nothing in _ONLY_SOME_USE.items()
        if key not in options.method.config_keys and getattr(options.config, key) != nothing
    ]


def _refuse_out_dir(options: MeasureOptions, names: Sequence[str]) -> None:
    """Refuse what can be known of the output folder before any work: an input, or results that would be in the way."""
    for entry in options.config.model_info:
        folder = os.path.expanduser(entry.name)
        if os.path.isdir(folder) and options.out_dir.exists() and os.path.samefile(folder, options.out_dir):
            raise UserError(
                f"--out_dir {options.out_dir} is the folder of model {entry.name}; choose another folder",
                "out-dir-is-model",
            )
    again = options.overwrite
    if not again:  # files of the very same measurement are kept; whether they are is known once the models are read
        manifest = read_manifest(options.out_dir) or {}
        asked = (options.config.options(), options.method.name)
        again = (manifest.get("options"), manifest.get("guidance")) == asked
    refuse_existing(options.out_dir, names, overwrite=again)


def _refuse_changed(subjects: Sequence[Subject], request: Mapping[str, Any]) -> None:
    for subject, recorded in zip(subjects, request["models"], strict=True):
        if any(recorded[key] != value for key, value in weight_file_record(subject.checkpoint).items()):
            raise UserError(
                f"model {subject.entry.name}: its weight files changed while they were measured; measure again",
                "model-changed",
            )


def quiet_libraries() -> None:
    """Import the libraries, and keep their own progress bars and chatter off the screen; their errors still show."""
    import_libraries("torch", "transformers", "transformers.modeling_utils", "accelerate", "pandas")

    import transformers
    from datasets.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()


def _choose_devices(options: MeasureOptions, say: Callable[[str], None]) -> list["torch.device"]:
    """The devices asked for; `say` takes the line with the reason."""
    devices, line = choose_devices(options.device, options.devices)
    say(line + (f"; {len(devices)} models side by side" if len(devices) > 1 else ""))
    return devices


def _at_once(options: MeasureOptions, subjects: Sequence[Subject], device: "torch.device") -> int:
    """How many models to measure at a time on the CPU unless `--devices` says it: as many as threads and memory allow.

    Threads that work on one small model together wait for each other after every short step, a third of the time. Where
    memory might be short, models are large, and such waits do not count; so a whole model's bytes are counted beside the
    estimate, which covers whatever a guidance method holds of one, such as a block's gradients.
    """
    import torch

    if options.devices or options.ray or device.type != "cpu":
        return 1
    most = max(memory_estimate(subject) + subject.checkpoint.total_bytes for subject in subjects)
    return max(1, min(len(subjects), torch.get_num_threads(), available_bytes(device) // (2 * most)))


def _request(options: MeasureOptions, job: MeasureJob, samples: Samples) -> dict[str, Any]:
    """Everything the result depends on, as the manifest records it."""
    texts = [_text_record(source, [sample.row for sample in chosen]) for source, chosen in samples.items()]
    return {
        "command": "lewis_importance",
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
                "dtype": str(subject.dtype).removeprefix("torch."),
                "tokens": sum(text.tokens for text in subject.texts.values()),
                "token_sha256": token_digest([ids for text in subject.texts.values() for ids in text.encoded]),
            }
            for subject in job.subjects
        ],
        **_routers(job.base),
        **_other_inputs(options),
    }


def _routers(base: Subject) -> dict[str, Any]:
    """The stored names of the routers, of a mixture: where the models are not at hand, command 2 knows them from here."""
    from utils.models.routers import stored_routers

    found = stored_routers(base.decoder.model, base.layout, f"model {base.entry.name}")
    return {"routers": found} if found else {}


def _other_inputs(options: MeasureOptions) -> dict[str, Any]:
    """The records of models and files that the method's own flags name, by flag."""
    named = options.method_options
    found: dict[str, Any] = {flag: weight_file_record(one) for flag, one in _named_checkpoints(options).items()}
    found |= {flag: {"sha256": file_sha256(Path(named[flag]))} for flag in options.method.file_flags if named.get(flag)}
    return {"other_inputs": found} if found else {}


def _named_checkpoints(options: MeasureOptions) -> dict[str, Checkpoint]:
    """The models that the method's own flags name, by flag."""
    named = options.method_options
    return {flag: open_checkpoint(named[flag]) for flag in options.method.model_flags if named.get(flag)}


def _checkpoints(options: MeasureOptions, subjects: Sequence[Subject]) -> list[Checkpoint]:
    """Every model that is read."""
    return [*(subject.checkpoint for subject in subjects), *_named_checkpoints(options).values()]


def _pieces_of(job: MeasureJob, workers: "RayWorkers | None", request: Mapping[str, Any]) -> dict[str, Any]:
    """What the bits of the pieces' results depend on beside the request."""
    import torch

    threads = torch.get_num_threads() if workers is None else workers.cpus
    return {**request, "threads": threads, "batches_a_piece": job.batches_a_piece}


def _text_record(source: CalibrationSource, rows: Sequence[int]) -> dict[str, Any]:
    full = with_defaults(source)
    return {"path": full.path, "subset": full.subset, "split": full.split, "seed": full.seed, "rows": list(rows)}


def _already_there(folder: Path, request: Mapping[str, Any]) -> bool:
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
