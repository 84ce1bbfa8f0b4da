"""Command 1's one job: measure every model of a pair on the calibration text and publish the dataframe folder."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands import measure_report as report
from utils.commands.measure_options import MeasureOptions
from utils.commands.measure_preparation import as_models_allow, devices_of, idle_keys, prepared_job, prepared_models
from utils.commands.measure_request import (
    already_there,
    as_begun,
    measure_request,
    not_changed,
    refuse_changed,
    refuse_missing_files,
)
from utils.commands.ray_flags import connected
from utils.errors import UserError, warn
from utils.guidance.few_tokens import fewest_tokens
from utils.guidance.folder import is_measurement, read_manifest
from utils.guidance.measure_job import ROUTING, TOKENS, Measured, MeasureJob
from utils.guidance.start import with_start
from utils.models.model_trial import ModelTrial
from utils.pair.calibration import choose_samples
from utils.pair.presence import refuse_missing, small_files
from utils.publishing.disk import bytes_on_disk, free_bytes
from utils.publishing.files import publish_files, repair_folder
from utils.publishing.kept import RESTART
from utils.publishing.manifest import MANIFEST, with_manifest
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing, refuse_others_manifest
from utils.runtime import (
    gigabytes,
    peak_gpu_memory,
    quiet_libraries,
    versions_line,
)
from utils.workers.results import finished_and_begun
from utils.workers.work_folder import folder_name, refuse_in_the_way, remove_work, work_folder

if TYPE_CHECKING:
    from utils.workers.ray_cluster import RayWorkers


WORK = ".measuring.part"  # in the output folder: results of pieces, until all are there


@dataclass(frozen=True)
class _Output:
    """What is printed of a measurement: all choices and the next command where it runs `alone`, else what an outer command has
    not said. `warned` are the warnings that were given before; they are not given again."""

    quiet: bool
    alone: bool
    warned: set[str]

    def say(self, line: str) -> None:
        """Print a line in both cases."""
        if not self.quiet:
            print(line)

    def detail(self, line: str) -> None:
        """Print a line where the measurement runs alone."""
        if self.alone:
            self.say(line)

    def warn(self, warnings: Iterable[str]) -> None:
        """Give the warnings that are new."""
        new = [line for line in warnings if line not in self.warned]
        self.warned.update(new)
        warn(new)


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
    options = replace(options, method=with_start(options.method, options.method_options))
    config, method = options.config, options.method
    output = _Output(options.quiet, alone, set() if warned is None else warned)
    method.check_experts(config, len(config.experts))
    names = [*method.files(config), ROUTING, TOKENS, MANIFEST]
    prepare_folder(options.out_dir, "--out_dir")
    mended = repair_folder(options.out_dir)
    warn([mended] if mended else [])
    _refuse_out_dir(options, names)
    refuse_missing(config)
    refuse_missing_files(options)
    if options.ray is not None:
        options.ray.refuse_devices(options.device, options.devices)
    quiet_libraries()
    trial = None if options.trust_remote_code else ModelTrial(small_files(config))
    if not alone:
        output.say(f"measuring: {method.name}, {method.summary}")
    output.detail(versions_line("torch", "transformers"))
    with connected(options.ray, output.detail) as workers:
        _measure(options, workers, trial, names, output)


def _measure(
    options: MeasureOptions,
    workers: "RayWorkers | None",
    trial: ModelTrial | None,
    names: Sequence[str],
    output: _Output,
) -> None:
    devices = devices_of(options, output.detail) if workers is None else [workers.device]
    samples = {source: choose_samples(source, options.config.nsamples) for source in options.config.texts}
    if trial is not None:
        trial.check()
    subjects = prepared_models(options, devices, samples)
    options = as_models_allow(options)
    job = prepared_job(options, workers, devices, subjects, output.detail)
    request = measure_request(options, job, samples)
    place = options.out_dir / WORK
    job, pieces_of = as_begun(place, job, workers, request)
    with contextlib.ExitStack() as stack:
        same = (place / folder_name(pieces_of)).is_dir
        stack.enter_context(locked_folder(options.out_dir, is_same=same, say=output.say))
        if not options.overwrite:
            if already_there(options.out_dir, request):
                remove_work(place)  # of a run that was killed once all was published
                _say_there(options, output)
                return
            refuse_existing(options.out_dir, names)
        for line in report.choices(options, job, samples):
            output.detail(line)
        if workers is None:
            _refuse_full_disk(options, job, place)
        output.warn(report.doubts(options, job, idle_keys(options)))
        start = time.perf_counter()
        if options.restart:
            remove_work(place)
        elif place.is_dir():
            output.say(_left_over(place, pieces_of))
        of_use = partial(not_changed, job.subjects, request)
        anew = RESTART if output.alone else f"removing {place} begins again"
        workspace = stack.enter_context(work_folder(place, pieces_of, keep=True, is_of_use=of_use, anew=anew))
        if workers is not None:
            workers.refuse_unlike(workspace, {one.checkpoint.folder: one.checkpoint.files for one in job.subjects})
        measured = options.method.measure(replace(job, workspace=workspace))
        refuse_changed(job.subjects, request)
        peak = peak_gpu_memory(devices if workers is None else [])
        output.say(f"measured in {time.perf_counter() - start:.2f} s{peak}")
        files = with_manifest(_contents(measured, job, output), request)
        publish_files(options.out_dir, files, overwrite=options.overwrite, last=output.alone)
    if not output.alone:
        output.say(f"wrote {options.out_dir}")
        return
    print(("" if options.quiet else "\n") + "wrote " + ", ".join(str(options.out_dir / name) for name in files))
    report.say_next(options)


def _contents(measured: Measured, job: MeasureJob, output: _Output) -> dict[str, bytes | Path]:
    """The files of what was measured, those that any method may have of mixtures among them; prints what is noted of it."""
    from utils.guidance.expert_tokens import few_tokens_lines, token_files  # pandas comes with it
    from utils.guidance.routing import routing_files, routing_lines

    few = few_tokens_lines(measured.expert_tokens, fewest_tokens(job.options))
    for note in (*measured.notes, *few, *routing_lines(measured.routing)):
        output.say(note)
    warn(measured.warnings)
    return {**measured.files, **routing_files(measured.routing), **token_files(measured.expert_tokens)}


def _say_there(options: MeasureOptions, output: _Output) -> None:
    text = f"{options.out_dir} already holds exactly this measurement; nothing to do"
    if not output.alone:
        output.say(text)
        return
    print(f"{text} (--overwrite makes it again)")
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
    """A line about what an interrupted run has left."""
    done, inside = finished_and_begun(place / folder_name(request))
    if not done and not inside:
        return f"removed what a killed run has left in {place.parent}"
    counts = [f"{what} {count}" for what, count in (("finished", done), ("begun", inside)) if count]
    pieces = "piece" if done + inside == 1 else "pieces"
    size = gigabytes(bytes_on_disk(place))
    return f"resumed: of the work's {pieces}, an interrupted run had {' and '.join(counts)} ({size})"


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
    again = options.overwrite or options.apart is not None  # what it is then hangs on the models, too
    if not again:  # files of the very same measurement are kept; whether they are is known once the models are read
        manifest = read_manifest(options.out_dir) or {}
        asked = (options.config.options(), options.method.name)
        again = (manifest.get("options"), manifest.get("guidance")) == asked
    refuse_existing(options.out_dir, names, overwrite=again)
