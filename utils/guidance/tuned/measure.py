"""tuned, measure half: a start, what experts gain, and one piece of work that tunes coefficients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.method import GuidanceMethod
from utils.guidance.own_text import accepted_doubts, both_forward, gains_on_own_text
from utils.guidance.start import start_of
from utils.guidance.tuned.descent import Descent, Step
from utils.guidance.tuned.guided_start import GuidedStart, guided_start, outlined_start
from utils.guidance.tuned.guided_start import depends_on as start_depends_on
from utils.guidance.tuned.memory import losses_bytes, parts_bytes, step_bytes
from utils.guidance.tuned.method import COEFFICIENTS, LEVEL, LEVELS, METHOD, STARTED_FROM, STEPS
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

_PIECE = "tuned+steps"  # no type of an expert holds a +
_BY_LOSSES = "tasks count by their losses then"
_FEWEST = 2
_SEEN = (
    "held out: of these steps alone; where the start was measured on the same text, its files have seen these samples, so what "
    "it loses there is too little (utils/evaluator.py scores on text that neither saw)"
)
_ROUTERS = {BASE: "the base's", MERGE: "merged like everything else"}


def check(job: MeasureJob) -> None:
    """Refuse what is known before anything is measured, of what makes the start, too. Raises a `UserError`."""
    if job.config.nsamples < _FEWEST:
        raise UserError(
            "nsamples is 1: some samples are held out to judge the steps; give 8 or more", "text-too-few-rows"
        )
    start, entries = _start(job), job.config.experts_to_merge
    if (first := _first(job)) is not None:
        first.check(job)
    for subject in (job.base, *_experts(job)):
        require_head(subject.decoder, subject.layout, f"model {subject.entry.name}")
    for expert in _experts(job):
        refuse_short(job.text(job.base, expert).encoded)
    plan_parts(start, job.base, entries, settings_of(job, job.devices[0], start))


def depends_on(job: MeasureJob) -> dict[str, Any]:
    """What a start depends on that is measured in the same go, as plain data."""
    first = _first(job)
    return {} if first is None else {**first.depends_on(job), **start_depends_on(job, first)}


def _first(job: MeasureJob) -> GuidanceMethod | None:
    """The guidance that is measured first, to start from."""
    return start_of(METHOD, job.options)


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    start, held, first = _start(job), held_out_of(job.config.nsamples), _first(job)
    each = "" if job.options[LEVEL] == LEVELS[-1] else f" and {job.options[LEVEL]}"
    at = job.options["start_recipe"] or "the plain mean of the changes"
    return [
        *([] if first is None else [f"first: {first.name}, {first.summary}", *first.choices(job)]),
        f"start: {at if first is None else f'what {first.name} gives'} ({start.merge_method})"
        + (f", routers: {_ROUTERS[start.router]}" if start.router else ""),
        f"tuned: one coefficient for each expert{each}, by at most {job.options['tune_steps']} "
        f"steps of Adam on {job.config.nsamples - held} samples of each task, judged on {held} others",
        f"disk: {gigabytes(_parts_bytes(job))} for what each expert adds, while measuring",
        *([_SEEN] if start.saliency else []),
    ]


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak, about: of what makes the start, of the merges that give the parts, of losses on held-out
    samples, or of a step."""
    start, first = _start(job), _first(job)
    samples = [ids for expert in _experts(job) for ids in job.text(job.base, expert).encoded]
    device = job.devices[0]
    settings = settings_of(job, device, start)
    needs = parts_bytes(start, job.base, [one.entry for one in _experts(job)], settings, device)
    before = 0 if first is None else first.memory(job)
    return max(before, needs, losses_bytes(job.base, samples), step_bytes(job.base, samples, device))


def waiting(job: MeasureJob) -> int:
    """Bytes that wait for the way back of a step, or of what makes the start, at most."""
    first = _first(job)
    return max(_waiting(job), 0 if first is None else first.waiting(job))


def _waiting(job: MeasureJob) -> int:
    return sum(_needed(job, expert).waiting for expert in _experts(job))


def on_disk(job: MeasureJob) -> int:
    """Bytes of what each expert adds, and of the hidden states that wait in files, beside what was measured of the start; or of
    measuring that."""
    own, first = _parts_bytes(job) + on_the_disk(_waiting(job), job.devices[0]), _first(job)
    return own if first is None else max(first.on_disk(job), first.left_on_disk(job) + own)


def _parts_bytes(job: MeasureJob) -> int:
    """Of a float32 number for each parameter and expert."""
    return 4 * sum(value.numel() for value in job.base.decoder.model.parameters()) * len(_experts(job))


def _needed(job: MeasureJob, expert: Subject) -> GradientMemory:
    return gradient_memory(job.base, job.text(job.base, expert).encoded)


def measure(job: MeasureJob) -> Measured:
    """Tune the coefficients of a start."""
    experts, first = _experts(job), _first(job)
    before = Measured({}) if first is None else first.measure(job)
    made = GuidedStart(_start(job), {}, ()) if first is None else guided_start(job, first, before, _models(job))
    start = made.start
    own = job.of(job.base, *experts)
    asked = "gain" if first is None else "losses"  # the start has asked in its own way, with other last bits
    on_text = gains_on_own_text(job, experts, both_forward, then=_BY_LOSSES, piece=asked)
    gains = on_text.gains
    blocks = len(job.base.decoder.blocks) * (3 * job.options["tune_steps"] + 1)
    types = (Tuned, Descent, Step)
    (found,) = job.run([Piece(_PIECE, tune, (own, start, gains, on_text.losses), blocks, METHOD.name, types)])
    files = {
        **before.files,
        COEFFICIENTS: COEFFICIENT_TABLE.content(found.rows),
        STEPS: STEP_TABLE.content(_step_rows(found.descent, [one.entry.type for one in experts])),
        STARTED_FROM: start_content(start.reading(start.saliency | made.names)),
    }
    steps, best = found.descent.steps, found.descent.best
    note = (
        f"share of the gains lost on held-out samples: {steps[0].lost:.3f} at the start, {steps[best].lost:.3f} after "
        f"step {best} of {len(steps) - 1}, which was kept"
    )
    doubts = [*before.warnings, *made.warnings]
    doubts += [] if best else ["no step was better than the start on held-out samples: all coefficients are 1"]
    doubts += accepted_doubts(gains, _BY_LOSSES)
    routing = before.routing or on_text.routing
    return Measured(files, (*before.notes, note), tuple(doubts), routing, before.expert_tokens)


def _experts(job: MeasureJob) -> tuple[Subject, ...]:
    return tuple(job.subject(entry) for entry in job.config.experts_to_merge)


def _start(job: MeasureJob) -> Start:
    """The start; one that is measured in the same go as far as it is known before."""
    models, path, first = _models(job), job.options["start_recipe"], _first(job)
    if apart := models.vocabulary_apart:
        raise UserError(
            f"pair config {job.config.path}: {', '.join(apart)} of some expert has another number of rows than the base's, and "
            "coefficients can be tuned where all have one vocabulary; leave that expert out (target_model_names), or take "
            "--guidance gram_mean, which merges such experts",
            "tuned-shapes",
        )
    if first is not None:
        return outlined_start(job, first, models)
    entries = job.config.experts_to_merge
    return plain_start(entries, models) if path is None else read_start(Path(path), job.base.entry, entries, models)


def _models(job: MeasureJob) -> LocalModels:
    return LocalModels(job.config.base, job.config.experts_to_merge, trust_remote_code=job.trust_remote_code)


def _step_rows(descent: Descent, tasks: Sequence[str]) -> list[tuple]:
    return [
        (number, task, samples, losses[place], step.lost, int(number == descent.best))
        for number, step in enumerate(descent.steps)
        for place, task in enumerate(tasks)
        for samples, losses in zip(SAMPLES, (step.losses, step.held_out), strict=True)
        if losses is not None
    ]
