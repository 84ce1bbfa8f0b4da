"""Command 1's one job: measure every model of a pair on the calibration text and publish the dataframe folder."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands import measure_report as report
from utils.commands.measure_options import MeasureOptions
from utils.commands.measure_request import (
    already_there,
    measure_request,
    not_changed,
    pieces_request,
    refuse_changed,
)
from utils.commands.ray_flags import connected
from utils.errors import UserError, warn
from utils.guidance.few_tokens import fewest_tokens
from utils.guidance.folder import is_measurement, read_manifest
from utils.guidance.measure_job import ROUTING, TOKENS, MeasureJob
from utils.guidance.method import GuidanceMethod
from utils.models.model_trial import ModelTrial
from utils.pair.calibration import choose_samples
from utils.pair.config import PairConfig
from utils.pair.presence import refuse_missing, small_files
from utils.passes.preparation import Precision, prepare_subjects
from utils.passes.subjects import Subject, memory_estimate
from utils.publishing.disk import bytes_on_disk, free_bytes
from utils.publishing.files import publish_files, repair_folder
from utils.publishing.kept import RESTART
from utils.publishing.manifest import MANIFEST, with_manifest
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing, refuse_others_manifest
from utils.runtime import (
    available_bytes,
    choose_devices,
    gigabytes,
    peak_gpu_memory,
    quiet_libraries,
    versions_line,
)
from utils.workers.results import finished_and_begun
from utils.workers.work_folder import folder_name, refuse_in_the_way, remove_work, work_folder

if TYPE_CHECKING:
    import torch

    from utils.workers.ray_cluster import RayWorkers


WORK = ".measuring.part"  # in the output folder: results of pieces, until all are there
_BATCHES_A_PIECE = 8  # on a cluster: enough that reading a model's weights for them pays


def measure_pair(options: MeasureOptions, *, alone: bool = True, warned: set[str] | None = None) -> None:
    """Check everything that can be known without weights, measure every model, publish the dataframe folder.

    Args:
        options: what was asked for.
        alone: whether this is all that runs, so that all choices are said and the next command is named at the end; else a
            line says what is measured, one how long it took.
        warned: warnings that were given before, which are not given again; new ones are added.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    config, method = options.config, options.method
    method.check_experts(config, len(config.experts))
    names = [*method.files(config), ROUTING, TOKENS, MANIFEST]
    prepare_folder(options.out_dir, "--out_dir")
    mended = repair_folder(options.out_dir)
    warn([mended] if mended else [])
    _refuse_out_dir(options, names)
    refuse_missing(config)
    if options.ray is not None:
        options.ray.refuse_devices(options.device, options.devices)
    quiet_libraries()
    say = print if not options.quiet else lambda line: None
    trial = None if options.trust_remote_code else ModelTrial(small_files(config))
    if not alone:
        say(f"measuring: {method.name}, {method.summary}")
    detail = say if alone else (lambda line: None)
    detail(versions_line("torch", "transformers"))
    with connected(options.ray, detail) as workers:
        _measure(options, workers, trial, names, (say, detail), alone, set() if warned is None else warned)


def _measure(
    options: MeasureOptions,
    workers: "RayWorkers | None",
    trial: ModelTrial | None,
    names: Sequence[str],
    voices: tuple[Callable[[str], None], Callable[[str], None]],
    alone: bool,
    warned: set[str],
) -> None:
    """`voices` print: what is always said, and choices in detail. `warned` is as in `measure_pair`."""
    config, method, (say, detail) = options.config, options.method, voices
    devices = _choose_devices(options, detail) if workers is None else [workers.device]
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
    method.check(job)
    if workers is None:
        from utils.commands.block_memory import parts_lines, placed_in_memory

        job = placed_in_memory(job, method)
        for line in parts_lines(job):
            detail(line)
    request = measure_request(options, job, samples)
    with contextlib.ExitStack() as stack:
        place, pieces_of = options.out_dir / WORK, pieces_request(job, workers, request)
        same = (place / folder_name(pieces_of)).is_dir
        stack.enter_context(locked_folder(options.out_dir, is_same=same, say=say))
        if not options.overwrite:
            if already_there(options.out_dir, request):
                remove_work(place)  # of a run that was killed once all was published
                again = " (--overwrite makes it again)" if alone else ""
                (print if alone else say)(
                    f"{options.out_dir} already holds exactly this measurement; nothing to do" + again
                )
                if alone:
                    report.say_next(options)
                return
            refuse_existing(options.out_dir, names)
        for line in report.choices(options, job, samples):
            detail(line)
        if workers is None:
            _refuse_full_disk(options, job, place)
        doubts = [line for line in report.doubts(options, job, _idle_keys(options)) if line not in warned]
        warned.update(doubts)
        warn(doubts)
        start = time.perf_counter()
        if options.restart:
            remove_work(place)
        elif place.is_dir():
            say(_left_over(place, pieces_of))
        of_use, anew = partial(not_changed, subjects, request), RESTART if alone else f"removing {place} begins again"
        workspace = stack.enter_context(work_folder(place, pieces_of, keep=True, is_of_use=of_use, anew=anew))
        if workers is not None:
            workers.refuse_unlike(workspace, {one.checkpoint.folder: one.checkpoint.files for one in subjects})
        measured = method.measure(replace(job, workspace=workspace))
        refuse_changed(subjects, request)
        say(f"measured in {time.perf_counter() - start:.2f} s{peak_gpu_memory(devices if workers is None else [])}")
        from utils.guidance.expert_tokens import few_tokens_lines, token_files  # pandas comes with it
        from utils.guidance.routing import routing_files, routing_lines

        few = few_tokens_lines(measured.expert_tokens, fewest_tokens(job.options))
        for note in (*measured.notes, *few, *routing_lines(measured.routing)):
            say(note)
        warn(measured.warnings)
        files = with_manifest(
            {**measured.files, **routing_files(measured.routing), **token_files(measured.expert_tokens)}, request
        )
        publish_files(options.out_dir, files, overwrite=options.overwrite, last=alone)
    if not alone:
        say(f"wrote {options.out_dir}")
    else:
        print(("" if options.quiet else "\n") + "wrote " + ", ".join(str(options.out_dir / name) for name in files))
        report.say_next(options)


def _refuse_full_disk(options: MeasureOptions, job: MeasureJob, place: Path) -> None:
    """Refuse a disk that cannot hold what measuring puts there.

    What lies in `place` counts as free: the same run goes on with it, and anything else in there is removed first.
    """
    needed = options.method.on_disk(job)
    free, folder = free_bytes(options.out_dir)
    free += bytes_on_disk(place)
    if free < needed:
        raise UserError(
            f"--out_dir {options.out_dir}: measuring puts up to {gigabytes(needed)} there, {folder} has {gigabytes(free)} "
            "free; make room, choose another disk, or lower nsamples or seqlen",
            "disk-full",
        )


def _left_over(place: Path, request: Mapping[str, Any]) -> str:
    """A line about what a run that was stopped has left."""
    done, inside = finished_and_begun(place / folder_name(request))
    if not done and not inside:
        return f"removed what a killed run has left in {place.parent}"
    begun = f", and {inside} begun" if inside else ""
    return f"resumed: {done} piece{'s' * (done != 1)} of the work had been finished{begun} by a run that was stopped"


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
    refuse_in_the_way(options.out_dir / WORK)
    refuse_others_manifest(options.out_dir, is_measurement)
    again = options.overwrite
    if not again:  # files of the very same measurement are kept; whether they are is known once the models are read
        manifest = read_manifest(options.out_dir) or {}
        asked = (options.config.options(), options.method.name)
        again = (manifest.get("options"), manifest.get("guidance")) == asked
    refuse_existing(options.out_dir, names, overwrite=again)


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
