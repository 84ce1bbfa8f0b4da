"""What command 1 prints: the choices first, then doubts, then what it wrote and what to do next."""

import math
from collections.abc import Iterator, Mapping, Sequence

from utils.commands.measure_options import MeasureOptions
from utils.commands.next_command import next_command
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import DEFAULT, GuidanceMethod
from utils.pair.calibration import text_doubts, with_defaults
from utils.pair.source import CalibrationSource
from utils.passes.preparation import Samples, model_doubts
from utils.passes.subjects import Subject
from utils.runtime import available_bytes, gigabytes

_FIRST_IDS = 5
# Bytes that freed tensors leave in the host's allocator, in the part of the thread that fetches weights (measured).
_ALLOCATED = 64 * 2**20


def choices(options: MeasureOptions, job: MeasureJob, samples: Samples) -> Iterator[str]:
    """Lines that say what will be measured, on which text, and how."""
    config, method = options.config, options.method
    if options.said:
        yield options.said
    yield f"guidance: {method.name}, {method.summary}"
    for source, chosen in samples.items():
        full = with_defaults(source)
        split = f", split {full.split}" if full.split and not source.path else ""
        whose = f" for {_users(job, source)}" if config.calibration else ""
        yield f"text{whose}: {len(chosen)} samples of {full.path}{split}, seed {full.seed}, at most {full.seqlen} tokens"
    yield from method.choices(job)
    if few := method.few_samples(config.nsamples):
        yield f"note: {few}"
    if job.workers is not None and method.tasks:
        yield f"tasks: {method.tasks}"
    for subject in job.subjects:
        yield from _subject_lines(options, job, subject)
    need = _memory(method, job)
    if waiting := method.waiting(job):
        where = "on the disk of --out_dir" if job.devices[0].type == "cpu" else "in the host's memory"
        yield f"gradients: hidden states at every block's entrance wait {where}, at most {gigabytes(waiting)}"
    if job.workers is None and (needed := method.on_disk(job)):
        yield f"--out_dir: measuring puts at most {gigabytes(needed)} there"
    if job.workers is None:
        free = gigabytes(available_bytes(job.devices[0]))
        yield f"memory: about {gigabytes(need)} on {job.devices[0].type} beside the runtime; {free} are free"
    else:
        yield f"memory: about {gigabytes(need)} on {job.devices[0].type} a task beside its runtime"


def _subject_lines(options: MeasureOptions, job: MeasureJob, subject: Subject) -> Iterator[str]:
    """One line, or where experts have texts of their own one more for each text that the model is measured on."""
    own = subject.checkpoint.float_dtype
    why = (
        "the checkpoint's own"
        if own == str(subject.dtype).removeprefix("torch.")
        else f"{own} is slow on this processor"
    )
    if options.dtype != "auto":
        why = "asked for"
    line = (
        f"{subject.entry.type}: {subject.entry.name}, {subject.checkpoint.architecture}, "
        f"{len(subject.decoder.blocks)} blocks, {gigabytes(subject.checkpoint.total_bytes)}, "
        f"{str(subject.dtype).removeprefix('torch.')} ({why})"
    )
    own = list(job.config.texts) if subject is job.base else [job.config.text_of(subject.entry.type)]
    counts = [
        f"{text.tokens} tokens in {len(text.batches)} micro-batch{'' if len(text.batches) == 1 else 'es'}, first ids "
        f"{text.encoded[0][:_FIRST_IDS]}"
        for text in (subject.texts[source] for source in own)
    ]
    if len(job.config.texts) == 1:
        yield f"{line}, {counts[0]}"
        return
    yield line
    for source, count in zip(own, counts, strict=True):
        yield f"  on the text for {_users(job, source)}: {count}"


def _users(job: MeasureJob, source: CalibrationSource) -> str:
    return ", ".join(entry.type for entry in job.config.experts if job.config.text_of(entry.type) == source)


def _memory(method: GuidanceMethod, job: MeasureJob) -> int:
    """Bytes that measuring needs beside the runtime, on one device; on a GPU tensors are all there is (measured to 1 %)."""
    return job.at_once * (method.memory(job) + (_ALLOCATED if job.devices[0].type == "cpu" else 0))


def doubts(options: MeasureOptions, job: MeasureJob, idle_keys: Sequence[str]) -> list[str]:
    """Sentences about text, models and memory; `idle_keys` are keys of the pair config that the method has no use for."""
    config, method = options.config, options.method
    found = [
        line for source, text in job.base.texts.items() for line in text_doubts(with_defaults(source), text.encoded)
    ]
    found += [line for subject in job.subjects for line in model_doubts(job.base, subject)]
    from utils.models.relative_change import strangers  # torch: this file is there before a mistake is found

    found += strangers(
        {one.entry.type: one.checkpoint for one in job.subjects}, config.base.type, [one.type for one in config.experts]
    )
    found += [f"{key} in the pair config has no effect with guidance {method.name}" for key in idle_keys]
    if method.text_per_task and len(config.texts) < len(config.experts):
        found.append(
            f"guidance {method.name} means each expert to be measured on text of its own task, but several share one; "
            "give calibration: {type: text} in the pair config"
        )
    need, free = _memory(method, job), available_bytes(job.devices[0]) if job.workers is None else math.inf
    if need > free:
        found.append(
            f"{gigabytes(need)} may not fit into {gigabytes(free)}; lower nsamples, seqlen or --micro_batch_tokens, or use "
            "--device cpu"
        )
    return found


def say_next(options: MeasureOptions) -> None:
    """Print the command that makes a recipe of what was measured."""
    flags: Mapping[str, object] = {
        "delta_dfs_in_dir": options.out_dir,
        "config_file": options.config.path,
        "out_dir": options.out_dir.parent / "merge_configs",
        **_recipe_flags(options),
        "trust_remote_code": options.trust_remote_code,
    }
    print("next:\n" + next_command("lewis_merge.py", flags))


def _recipe_flags(options: MeasureOptions) -> Mapping[str, object]:
    """The guidance, the merge method that fits what was measured, and for one expert the density to keep; where deltas are
    added up, no more of them than held in tests."""
    method, several = options.method, len(options.config.target_model_names) > 1
    merge_method = method.several if several and method.several else method.merge_method
    if method.measured_for is not None:
        merge_method = method.measured_for(options.out_dir)
    if method.name != DEFAULT:
        density = None if several else method.density_alone
        return {"guidance": method.name, "merge_method": merge_method, "mean_density": density}
    return {"merge_method": merge_method, "gamma": 0.3, "epsilon": 0.8, **({"lambda": 0.4} if several else {})}
