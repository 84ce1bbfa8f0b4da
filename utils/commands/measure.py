"""Command 1's one job: measure every model of a pair on the calibration text and publish the dataframe folder."""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.guidance.folder import folder_files, read_manifest
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import DEFAULT, GuidanceMethod
from utils.models.checkpoints import weight_file_record
from utils.pair.calibration import choose_samples, text_doubts, token_digest, with_defaults
from utils.pair.config import PairConfig
from utils.pair.source import CalibrationSource
from utils.passes.subjects import Precision, Samples, Subject, memory_estimate, model_doubts, prepare_subjects
from utils.publish import MANIFEST, file_sha256, locked_folder, prepare_folder, publish_files, refuse_existing
from utils.runtime import (
    available_bytes,
    choose_device,
    device_name,
    gigabytes,
    import_libraries,
    peak_gpu_memory,
    versions,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MeasureOptions:
    """What command 1 was asked to do. `method_options` are the values of the guidance method's own flags."""

    config: PairConfig
    method: GuidanceMethod
    method_options: Mapping[str, Any]
    out_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    micro_batch_tokens: int | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    devices: str | None = None


def measure_pair(options: MeasureOptions) -> None:
    """Check everything that can be known without weights, measure every model, publish the dataframe folder.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    config, method = options.config, options.method
    method.check_experts(config, len(config.experts))
    names = [*method.files(config), MANIFEST]
    prepare_folder(options.out_dir, "--out_dir")
    _refuse_out_dir(options, names)
    quiet_libraries()
    print(_versions_line())
    devices = _choose_devices(options)
    samples = {source: choose_samples(source, config.nsamples) for source in config.texts}
    precision = Precision(devices[0], options.dtype, options.micro_batch_tokens)
    subjects = tuple(prepare_subjects(_used(config, method), samples, precision, options.trust_remote_code))
    at_once = _at_once(options, subjects, devices[0])
    job = MeasureJob(config, subjects, tuple(devices), options.method_options, options.trust_remote_code, at_once)
    request = _request(options, job, samples)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_folder(options.out_dir))
        if not options.overwrite:
            if _already_there(options.out_dir, request):
                print(f"{options.out_dir} already holds exactly this measurement; nothing to do")
                _say_next(options)
                return
            refuse_existing(options.out_dir, names)
        _say_choices(options, job, samples)
        start = time.perf_counter()
        workspace = stack.enter_context(_workspace(options.out_dir))
        measured = method.measure(replace(job, workspace=workspace))
        _refuse_changed(subjects, request)
        print(f"measured in {time.perf_counter() - start:.2f} s{peak_gpu_memory(devices)}")
        for note in measured.notes:
            print(note)
        for warning in measured.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        files = folder_files(measured.files, request)
        publish_files(options.out_dir, files, overwrite=options.overwrite)
    print("\nwrote " + ", ".join(str(options.out_dir / name) for name in files))
    _say_next(options)


@contextlib.contextmanager
def _workspace(out_dir: Path) -> Iterator[Path]:
    """Where a method may make a folder in a locked output folder; what a killed run has left there is removed first."""
    workspace = out_dir / ".measuring.part"
    shutil.rmtree(workspace, ignore_errors=True)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


_ONLY_SOME_USE = {
    "sparsity_ratio": 0.0,
    "parity": False,
    "components": None,
}  # keys, with the value that asks for nothing


def _used(config: PairConfig, method: GuidanceMethod) -> PairConfig:
    """The config without what the method has no use for."""
    idle = {key: value for key, value in _ONLY_SOME_USE.items() if key not in method.config_keys}
    return replace(config, **idle)


def _refuse_out_dir(options: MeasureOptions, names: Sequence[str]) -> None:
    """Refuse what can be known of the output folder before any work: an input, or results that would be in the way."""
    for entry in options.config.model_info:
        folder = os.path.expanduser(entry.name)
        if os.path.isdir(folder) and options.out_dir.exists() and os.path.samefile(folder, options.out_dir):
            raise UserError(f"--out_dir {options.out_dir} is the folder of model {entry.name}; choose another folder")
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
                f"model {subject.entry.name}: its weight files changed while they were measured; measure again"
            )


def quiet_libraries() -> None:
    """Import the libraries, and keep their own progress bars and chatter off the screen; their errors still show."""
    import_libraries("torch", "transformers", "transformers.modeling_utils", "accelerate", "pandas")

    import transformers
    from datasets.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()


def _choose_devices(options: MeasureOptions) -> list["torch.device"]:
    """The devices asked for, printed with the reason.

    Raises:
        UserError: a device that is not there, or devices of different kinds.
    """
    chosen = [choose_device(asked.strip()) for asked in (options.devices or options.device).split(",")]
    devices = [device for device, _ in chosen]
    if len({device.type for device in devices}) > 1:
        raise UserError(f"--devices {options.devices}: CPU and GPU give different roundings; name devices of one kind")
    listed = ", ".join(device_name(device) for device in devices)
    side = f"; {len(devices)} models side by side" if len(devices) > 1 else ""
    print(f"device: {listed}, {chosen[0][1]}{side}")
    return devices


def _at_once(options: MeasureOptions, subjects: Sequence[Subject], device: "torch.device") -> int:
    """How many models to measure at a time on the CPU unless `--devices` says it: as many as threads and memory allow.

    Threads that work on one small model together wait for each other after every short step, a third of the time. Where
    memory might be short, models are large, and such waits do not count; so a whole model's bytes are counted beside the
    estimate, which covers whatever a guidance method holds of one, such as a block's gradients.
    """
    import torch

    if options.devices or device.type != "cpu" or any(subject.headers is None for subject in subjects):
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
    }


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


def _versions_line() -> str:
    found = versions()
    return "versions: " + ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers"))


def _say_choices(options: MeasureOptions, job: MeasureJob, samples: Samples) -> None:
    config, method = options.config, options.method
    print(f"guidance: {method.name}, {method.summary}")
    for source, chosen in samples.items():
        full = with_defaults(source)
        split = f", split {full.split}" if full.split and not source.path else ""
        users = [entry.type for entry in config.experts if config.text_of(entry.type) == source]
        whose = f" for {', '.join(users)}" if config.calibration else ""
        print(
            f"text{whose}: {len(chosen)} samples of {full.path}{split}, seed {full.seed}, at most {full.seqlen} tokens"
        )
    for line in method.choices(job):
        print(line)
    for subject in job.subjects:
        why = "the checkpoint's own" if options.dtype == "auto" else "asked for"
        texts = subject.texts.values()
        print(
            f"{subject.entry.type}: {subject.entry.name}, {subject.checkpoint.architecture}, "
            f"{len(subject.decoder.blocks)} blocks, {gigabytes(subject.checkpoint.total_bytes)}, "
            f"{str(subject.dtype).removeprefix('torch.')} ({why}), {sum(text.tokens for text in texts)} tokens in "
            f"{sum(len(text.batches) for text in texts)} micro-batches, first ids {next(iter(texts)).encoded[0][:5]}"
        )
    for doubt in _doubts(method, job):
        print(f"warning: {doubt}", file=sys.stderr)
    _say_memory(job)


def _doubts(method: GuidanceMethod, job: MeasureJob) -> list[str]:
    config = job.config
    found = [
        line for source, text in job.base.texts.items() for line in text_doubts(with_defaults(source), text.encoded)
    ]
    found += [line for subject in job.subjects for line in model_doubts(job.base, subject)]
    for key, nothing in _ONLY_SOME_USE.items():
        if key not in method.config_keys and getattr(config, key) != nothing:
            found.append(f"{key} in the pair config has no effect with guidance {method.name}")
    if method.text_per_task and len(config.texts) < len(config.experts):
        found.append(
            f"guidance {method.name} means each expert to be measured on text of its own task, but several share one; "
            "give calibration: {type: text} in the pair config"
        )
    return found


def _say_memory(job: MeasureJob) -> None:
    subjects, device = job.subjects, job.devices[0]
    need = job.at_once * max(memory_estimate(subject) for subject in subjects)
    free = available_bytes(device)
    print(f"memory: about {gigabytes(need)} on {device.type} beside the runtime; {gigabytes(free)} are free")
    if need > free:
        print(
            "warning: that may not fit; lower nsamples, seqlen or --micro_batch_tokens, or use --device cpu",
            file=sys.stderr,
        )
    for subject in subjects:
        if subject.headers is None:
            print(
                f"warning: transformers converts the names of {subject.entry.name} while loading, so all of it "
                f"({gigabytes(subject.checkpoint.total_bytes)}) is loaded into memory",
                file=sys.stderr,
            )


def _say_next(options: MeasureOptions) -> None:
    paths = (options.out_dir, options.config.path, options.out_dir.parent / "merge_configs")
    out_dir, config, recipes = (shlex.quote(str(path)) for path in paths)
    print(
        "next:\n"
        f"  python3 lewis_merge.py --delta_dfs_in_dir {out_dir} --config_file {config} \\\n"
        f"    --out_dir {recipes} {_next_flags(options.method)}"
    )


def _next_flags(method: GuidanceMethod) -> str:
    if method.name == DEFAULT:
        return f"--gamma 0.3 --epsilon 0.8 --merge_method {method.merge_method}"
    return f"--guidance {method.name} --merge_method {method.merge_method}"
