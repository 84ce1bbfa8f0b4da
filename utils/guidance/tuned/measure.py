"""tuned, measure half: a start, what experts gain, and one piece of work that tunes coefficients."""

from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.own_text import accepted_doubts, both_forward, gains_on_own_text
from utils.guidance.tuned.descent import Descent, Step
from utils.guidance.tuned.memory import losses_bytes, parts_bytes, step_bytes
from utils.guidance.tuned.method import COEFFICIENTS, LEVEL, LEVELS, START, STEPS
from utils.guidance.tuned.parts import plan_parts
from utils.guidance.tuned.start import Start, plain_start, read_start
from utils.guidance.tuned.tables import COEFFICIENT_TABLE, SAMPLES, STEP_TABLE, start_content
from utils.guidance.tuned.tuning import Tuned, held_out_of, settings_of, tune
from utils.passes.gradient_memory import GradientMemory, gradient_memory, on_the_disk
from utils.passes.gradient_refusals import refuse_short
from utils.passes.language_head import require_head
from utils.passes.subjects import Subject
from utils.recipes.naming import LocalModels
from utils.recipes.routers import BASE, MERGE
from utils.runtime import gigabytes
from utils.workers.piece import Piece

_BY_LOSSES = "tasks count by their losses then"
_FEWEST = 2
_SEEN = (
    "held out: of these steps alone; where the start was measured on the same text, its files have seen these samples, so what "
    "it loses there is too little (utils/evaluator.py scores on text that neither saw)"
)
_ROUTERS = {BASE: "the base's", MERGE: "merged like everything else"}


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    start, held = _start(job), held_out_of(job.config.nsamples)
    each = "" if job.options[LEVEL] == LEVELS[-1] else f" and {job.options[LEVEL]}"
    return [
        f"start: {job.options['start_recipe'] or 'the plain mean of the changes'} ({start.merge_method})"
        + (f", routers: {_ROUTERS[start.router]}" if start.router else ""),
        f"tuned: one coefficient for each expert{each}, by at most {job.options['tune_steps']} "
        f"steps of Adam on {job.config.nsamples - held} samples of each task, judged on {held} others",
        f"disk: {gigabytes(_parts_bytes(job))} for what each expert adds, while measuring",
        *([_SEEN] if start.saliency else []),
    ]


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak, about: of the merges that give the parts, of losses on held-out samples, or of a step."""
    start = _start(job)
    samples = [ids for expert in _experts(job) for ids in job.text(job.base, expert).encoded]
    device = job.devices[0]
    settings = settings_of(job, device, start)
    needs = parts_bytes(start, job.base, [one.entry for one in _experts(job)], settings, device)
    return max(needs, losses_bytes(job.base, samples), step_bytes(job.base, samples, device))


def waiting(job: MeasureJob) -> int:
    """Bytes that wait for the way back of a step, at most."""
    return sum(_needed(job, expert).waiting for expert in _experts(job))


def on_disk(job: MeasureJob) -> int:
    """Bytes of what each expert adds, and of the hidden states that wait in files."""
    return _parts_bytes(job) + on_the_disk(waiting(job), job.devices[0])


def _parts_bytes(job: MeasureJob) -> int:
    """Of a float32 number for each parameter and expert."""
    return 4 * sum(value.numel() for value in job.base.decoder.model.parameters()) * len(_experts(job))


def _needed(job: MeasureJob, expert: Subject) -> GradientMemory:
    return gradient_memory(job.base, job.text(job.base, expert).encoded)


def measure(job: MeasureJob) -> Measured:
    """Tune the coefficients of a start."""
    start, experts = _start(job), _experts(job)
    if job.config.nsamples < _FEWEST:
        raise UserError(
            "nsamples is 1: some samples are held out to judge the steps; give 8 or more", "text-too-few-rows"
        )
    for subject in (job.base, *experts):
        require_head(subject.decoder, subject.layout, f"model {subject.entry.name}")
    for expert in experts:
        refuse_short(job.text(job.base, expert).encoded)
    own = job.of(job.base, *experts)
    plan_parts(start, own.subjects[0], [one.entry for one in experts], settings_of(job, job.devices[0], start))
    on_text = gains_on_own_text(job, experts, both_forward, then=_BY_LOSSES)
    gains = on_text.gains
    blocks = len(job.base.decoder.blocks) * (3 * job.options["tune_steps"] + 1)
    types = (Tuned, Descent, Step)
    (found,) = job.run([Piece("tuned", tune, (own, start, gains, on_text.losses), blocks, "tuned", types)])
    files = {
        COEFFICIENTS: COEFFICIENT_TABLE.content(found.rows),
        STEPS: STEP_TABLE.content(_step_rows(found.descent, [one.entry.type for one in experts])),
        START: start_content(start),
    }
    steps, best = found.descent.steps, found.descent.best
    note = (
        f"share of the gains lost on held-out samples: {steps[0].lost:.3f} at the start, {steps[best].lost:.3f} after "
        f"step {best} of {len(steps) - 1}, which was kept"
    )
    doubts = [] if best else ["no step was better than the start on held-out samples: all coefficients are 1"]
    doubts += accepted_doubts(gains, _BY_LOSSES)
    return Measured(files, (note,), tuple(doubts), routing=on_text.routing)


def _experts(job: MeasureJob) -> tuple[Subject, ...]:
    return tuple(job.subject(entry) for entry in job.config.experts_to_merge)


def _start(job: MeasureJob) -> Start:
    entries, path = [one.entry for one in _experts(job)], job.options["start_recipe"]
    models = LocalModels(job.config.base, entries, trust_remote_code=job.trust_remote_code)
    if apart := models.vocabulary_apart:
        raise UserError(
            f"pair config {job.config.path}: {', '.join(apart)} of some expert has another number of rows than the base's, and "
            "coefficients can be tuned where all have one vocabulary; leave that expert out (target_model_names), or take "
            "--guidance gram_mean, which merges such experts",
            "tuned-shapes",
        )
    return plain_start(entries, models) if path is None else read_start(Path(path), job.base.entry, entries, models)


def _step_rows(descent: Descent, tasks: Sequence[str]) -> list[tuple]:
    return [
        (number, task, samples, losses[place], step.lost, int(number == descent.best))
        for number, step in enumerate(descent.steps)
        for place, task in enumerate(tasks)
        for samples, losses in zip(SAMPLES, (step.losses, step.held_out), strict=True)
        if losses is not None
    ]
