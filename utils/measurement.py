"""Command 1's one job: measure every model of a pair on the calibration text and publish the dataframe folder."""

import concurrent.futures
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.calibration import Sample, choose_samples, text_doubts, token_digest, with_defaults
from utils.checkpoints import weight_file_record
from utils.errors import UserError
from utils.frames import NORMS, delta_file, measurement_files, read_manifest
from utils.pair_config import PairConfig
from utils.publish import MANIFEST, file_sha256, locked_folder, prepare_folder, publish_files, refuse_existing
from utils.runtime import (
    available_bytes,
    choose_device,
    device_name,
    gigabytes,
    peak_gpu_memory,
    return_freed_memory,
    versions,
)
from utils.subjects import Precision, Subject, memory_estimate, model_doubts, prepare_subjects

if TYPE_CHECKING:
    import pandas as pd
    import torch


@dataclass(frozen=True)
class MeasureOptions:
    """What command 1 was asked to do."""

    config: PairConfig
    out_dir: Path
    device: str
    dtype: str
    micro_batch_tokens: int | None
    trust_remote_code: bool
    overwrite: bool
    devices: str | None = None


def measure_pair(options: MeasureOptions) -> None:
    """Check everything that can be known without weights, measure every model, publish the dataframe folder.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    config = options.config
    names = [*(delta_file(entry.type) for entry in config.experts), NORMS, MANIFEST]
    prepare_folder(options.out_dir, "--out_dir")
    _refuse_out_dir(options, names)
    quiet_libraries()
    print(_versions_line())
    devices = _choose_devices(options)
    device = devices[0]
    samples = choose_samples(config.dataset, config.nsamples)
    precision = Precision(device, options.dtype, options.micro_batch_tokens)
    subjects = prepare_subjects(config, samples, precision, options.trust_remote_code)
    request = _request(options, subjects, samples, device)
    with locked_folder(options.out_dir):
        if not options.overwrite:
            if _already_there(options.out_dir, request):
                print(f"{options.out_dir} already holds exactly this measurement; nothing to do")
                _say_next(options)
                return
            refuse_existing(options.out_dir, names)
        _say_choices(options, subjects, samples, device)
        start = time.perf_counter()
        norms = _measure_all(subjects, devices, options)
        _refuse_changed(subjects, request)
        print(f"measured in {time.perf_counter() - start:.2f} s{peak_gpu_memory(devices)}")
        files = _files(config, norms, request)
        publish_files(options.out_dir, files, overwrite=options.overwrite)
    print("\nwrote " + ", ".join(str(options.out_dir / name) for name in files))
    _say_next(options)


def _refuse_out_dir(options: MeasureOptions, names: Sequence[str]) -> None:
    """Refuse what can be known of the output folder before any work: an input, or results that would be in the way."""
    for entry in options.config.model_info:
        folder = os.path.expanduser(entry.name)
        if os.path.isdir(folder) and options.out_dir.exists() and os.path.samefile(folder, options.out_dir):
            raise UserError(f"--out_dir {options.out_dir} is the folder of model {entry.name}; choose another folder")
    replace = options.overwrite
    if not replace:  # files of the very same measurement are kept; whether they are is known once the models are read
        manifest = read_manifest(options.out_dir) or {}
        replace = manifest.get("options") == options.config.options()
    refuse_existing(options.out_dir, names, overwrite=replace)


def _refuse_changed(subjects: Sequence[Subject], request: Mapping[str, Any]) -> None:
    for subject, recorded in zip(subjects, request["models"], strict=True):
        if any(recorded[key] != value for key, value in weight_file_record(subject.checkpoint).items()):
            raise UserError(
                f"model {subject.entry.name}: its weight files changed while they were measured; measure again"
            )


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and chatter off the screen; their errors still show."""
    import transformers
    from datasets.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()


def _measure_all(
    subjects: Sequence[Subject], devices: Sequence["torch.device"], options: MeasureOptions
) -> "pd.DataFrame":
    """Tidy norms of every model, in order; models are measured side by side if there are several devices."""
    import pandas as pd
    from tqdm import tqdm

    total = sum(len(subject.decoder.blocks) for subject in subjects)
    free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    given_up = threading.Event()
    with tqdm(total=total, unit="block", desc="measuring", file=sys.stderr) as bar:

        def on_block(layer: int) -> None:
            return_freed_memory()  # else the freed temporaries of block after block pile up
            bar.update()
            if given_up.is_set():
                raise concurrent.futures.CancelledError

        def measure(subject: Subject) -> list[dict[str, Any]]:
            device = free.get()
            bar.set_postfix_str(subject.entry.type)
            try:
                return _measure(subject, device, options, on_block)
            finally:
                free.put(device)

        if len(devices) == 1:
            return pd.DataFrame([row for subject in subjects for row in measure(subject)])
        with concurrent.futures.ThreadPoolExecutor(len(devices), thread_name_prefix="measure") as pool:
            try:
                return pd.DataFrame([row for rows in pool.map(measure, subjects) for row in rows])
            except BaseException:
                given_up.set()
                pool.shutdown(cancel_futures=True)
                raise


def _choose_devices(options: MeasureOptions) -> list["torch.device"]:
    """The devices asked for, printed with the reason; CPU workers share its threads.

    Raises:
        UserError: a device that is not there, or devices of different kinds.
    """
    import torch

    chosen = [choose_device(asked.strip()) for asked in (options.devices or options.device).split(",")]
    devices = [device for device, _ in chosen]
    if len({device.type for device in devices}) > 1:
        raise UserError(f"--devices {options.devices}: CPU and GPU give different roundings; name devices of one kind")
    if devices[0].type == "cpu" and len(devices) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    listed = ", ".join(device_name(device) for device in devices)
    side = f"; {len(devices)} models side by side" if len(devices) > 1 else ""
    print(f"device: {listed}, {chosen[0][1]}{side}")
    return devices


def _measure(subject: Subject, device: "torch.device", options: MeasureOptions, on_block) -> list[dict[str, Any]]:
    import torch

    from utils.block_runner import run_blocks
    from utils.guidance.lewis import LewisVisitor
    from utils.weight_source import ResidentWeights, StreamedWeights

    config = options.config
    if subject.headers is None:
        weights = ResidentWeights(subject.checkpoint, device, subject.dtype, options.trust_remote_code)
    else:
        weights = StreamedWeights(subject.headers, device, subject.dtype)
    divisor = len(subject.encoded) if config.parity else subject.tokens
    visitor = LewisVisitor(subject.decoder, subject.tokens, divisor, config.sparsity_ratio)
    try:
        run_blocks(subject.decoder, weights, subject.batches, visitor, device, on_block=on_block)
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"model {subject.entry.name}: the GPU ran out of memory; lower --micro_batch_tokens, nsamples or seqlen, "
            "or use --device cpu"
        ) from None
    rows = []
    for (layer, name), norm in visitor.norms.items():
        component = next(part for part in subject.decoder.components if part.name == name)
        weight = subject.decoder.weight_name(layer, component)
        value = float(norm)
        if not value < float("inf"):
            raise UserError(
                f"model {subject.entry.name}: the norm of {weight} is {value}: its weights or its inputs are not "
                f"finite in {subject.dtype}; check the checkpoint, or use --dtype float32 or bfloat16"
            )
        module = subject.decoder.blocks[layer].get_submodule(component.path)
        tensor = weight if subject.headers is None else subject.headers[weight].name
        rows.append(
            {
                "model": subject.entry.type,
                "layer": layer,
                "component": name,
                "tensor": tensor,
                "norm": value,
                "params": module.weight.numel(),
            }
        )
    return rows


def _files(config: PairConfig, norms: "pd.DataFrame", request: Mapping[str, Any]) -> dict[str, bytes]:
    from utils.guidance.lewis import delta_table

    components = list(dict.fromkeys(norms["component"]))
    deltas = {
        entry.type: delta_table(norms, entry.type, config.base_model_type, components) for entry in config.experts
    }
    for entry in config.experts:
        if not deltas[entry.type].to_numpy().any():
            print(
                f"warning: {entry.name} has exactly the base's norms everywhere; is it the same model?",
                file=sys.stderr,
            )
    return measurement_files(deltas, norms, config.base_model_type, request)


def _request(
    options: MeasureOptions, subjects: Sequence[Subject], samples: Sequence[Sample], device: "torch.device"
) -> dict[str, Any]:
    """Everything the result depends on, as the manifest records it."""
    source = with_defaults(options.config.dataset)
    return {
        "command": "lewis_importance",
        "guidance": "lewis",
        "versions": versions(),
        "options": options.config.options(),
        "device": device.type,
        "micro_batch_tokens": options.micro_batch_tokens,
        "samples": {
            "path": source.path,
            "subset": source.subset,
            "split": source.split,
            "seed": source.seed,
            "rows": [sample.row for sample in samples],
        },
        "models": [
            {
                "type": subject.entry.type,
                **weight_file_record(subject.checkpoint),
                "dtype": str(subject.dtype).removeprefix("torch."),
                "tokens": subject.tokens,
                "token_sha256": token_digest(subject.encoded),
            }
            for subject in subjects
        ],
    }


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


def _say_choices(
    options: MeasureOptions, subjects: Sequence[Subject], samples: Sequence[Sample], device: "torch.device"
) -> None:
    config, source = options.config, with_defaults(options.config.dataset)
    split = f", split {source.split}" if source.split and not options.config.dataset.path else ""
    print(f"text: {len(samples)} samples of {source.path}{split}, seed {source.seed}, at most {source.seqlen} tokens")
    decoder = subjects[0].decoder
    names = ", ".join(part.name for part in decoder.components)
    print(f"components: {names} ({'as configured' if config.components else 'every linear part of a block'})")
    if config.parity:
        print("parity: reference (samples padded with EOS, pads attended and counted, means over samples)")
    if config.sparsity_ratio:
        print(f"pruning while measuring: {config.sparsity_ratio:g} of each row, by the Wanda metric")
    for subject in subjects:
        why = "the checkpoint's own" if options.dtype == "auto" else "asked for"
        print(
            f"{subject.entry.type}: {subject.entry.name}, {subject.checkpoint.architecture}, "
            f"{len(subject.decoder.blocks)} blocks, {gigabytes(subject.checkpoint.total_bytes)}, "
            f"{str(subject.dtype).removeprefix('torch.')} ({why}), {subject.tokens} tokens in "
            f"{len(subject.batches)} micro-batches, first ids {subject.encoded[0][:5]}"
        )
    base = next(subject for subject in subjects if subject.entry == config.base)
    questions = text_doubts(source, base.encoded)
    for question in [*questions, *(line for subject in subjects for line in model_doubts(base, subject))]:
        print(f"warning: {question}", file=sys.stderr)
    _say_memory(subjects, device)


def _say_memory(subjects: Sequence[Subject], device: "torch.device") -> None:
    need = max(memory_estimate(subject) for subject in subjects)
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
        f"    --out_dir {recipes} --gamma 0.3 --epsilon 0.8 --merge_method ties"
    )
