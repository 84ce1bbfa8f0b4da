"""From what command 1 was asked to a job that can be measured: devices, prepared models, how many at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from utils.commands.measure_options import MeasureOptions
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import GuidanceMethod
from utils.pair.config import PairConfig
from utils.passes.preparation import Precision, Samples, prepare_subjects
from utils.passes.subjects import Subject, memory_estimate
from utils.recipes.naming import LocalModels
from utils.runtime import available_bytes, choose_devices

if TYPE_CHECKING:
    import torch

    from utils.workers.ray_cluster import RayWorkers

_BATCHES_A_PIECE = 8  # on a cluster: enough that reading a model's weights for them pays


def devices_of(options: MeasureOptions, say: Callable[[str], None]) -> list["torch.device"]:
    """The devices asked for; `say` takes the line with the reason."""
    devices, line = choose_devices(options.device, options.devices)
    say(line + (f"; {len(devices)} models side by side" if len(devices) > 1 else ""))
    return devices


def prepared_models(options: MeasureOptions, devices: "list[torch.device]", samples: Samples) -> tuple[Subject, ...]:
    """Every model, fetched and made ready. Raises a `UserError` if one or its tokenizer cannot be used."""
    precision = Precision(devices[0], options.dtype, options.micro_batch_tokens)
    return tuple(prepare_subjects(_used(options.config, options.method), samples, precision, options.trust_remote_code))


def as_models_allow(options: MeasureOptions) -> MeasureOptions:
    """The options as they are for models that lie on this machine by now: `apart` where experts have other numbers of tokens
    than the base. Raises as `apart`, and as `LocalModels`."""
    if options.apart is None:
        return options
    config = options.config
    models = LocalModels(config.base, config.experts_to_merge, trust_remote_code=options.trust_remote_code)
    if not models.vocabulary_apart:
        return options
    chosen = options.apart()
    return replace(options, method=chosen.method, method_options=chosen.options, said=chosen.said, apart=None)


def prepared_job(
    options: MeasureOptions,
    workers: "RayWorkers | None",
    devices: "list[torch.device]",
    subjects: tuple[Subject, ...],
    say: Callable[[str], None],
) -> MeasureJob:
    """The job of prepared models, whose blocks on this machine are known to fit into memory.

    `say` takes lines about models whose experts are fetched one at a time.

    Raises:
        UserError: a model does not fit into memory; what the method refuses.
    """
    job = MeasureJob(
        options.config,
        subjects,
        tuple(devices),
        options.method_options,
        options.trust_remote_code,
        _at_once(options, subjects, devices[0]),
        quiet=options.quiet,
        workers=workers,
        batches_a_piece=None if workers is None else _BATCHES_A_PIECE,
    )
    options.method.check(job)
    if workers is not None:
        return job

    from utils.commands.block_memory import parts_lines, placed_in_memory

    job = placed_in_memory(job, options.method)
    for line in parts_lines(job):
        say(line)
    return job


# keys that some methods alone use, with the value that asks for nothing
_ONLY_SOME_USE = {"sparsity_ratio": 0.0, "parity": False, "components": None}


def _used(config: PairConfig, method: GuidanceMethod) -> PairConfig:
    """The config without what the method has no use for."""
    idle = {key: value for key, value in _ONLY_SOME_USE.items() if key not in method.config_keys}
    return replace(config, **idle)


def idle_keys(options: MeasureOptions) -> list[str]:
    """Keys that the config gives and the method has no use for."""
    return [
        key
        for key, nothing in _ONLY_SOME_USE.items()
        if key not in options.method.config_keys and getattr(options.config, key) != nothing
    ]


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
