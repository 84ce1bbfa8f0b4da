"""tuned, measure half: the parts of a recipe's merge, and steps of gradient descent on their coefficients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.measured_pair import experts_to_merge
from utils.guidance.text_gain import ACCEPT, TextGain, refuse_useless_text, text_gain
from utils.guidance.tuned.descent import Asked, Descent, Step, Weigh, descend
from utils.guidance.tuned.method import COEFFICIENTS, START, STEPS
from utils.guidance.tuned.parts import Parts, SummedWeights, plan_parts, write_parts
from utils.guidance.tuned.slopes import CoefficientSlopes, group_numbers
from utils.guidance.tuned.start import Start, plain_start, read_start
from utils.guidance.tuned.tables import COEFFICIENT_TABLE, SAMPLES, STEP_TABLE, start_content
from utils.merging.settings import MergeSettings
from utils.passes.block_gradients import backward_pass
from utils.passes.gradient_memory import GradientMemory, gradient_memory, on_the_disk
from utils.passes.language_head import require_head
from utils.passes.snapshots import read_state, write_state
from utils.passes.subjects import Subject, component_names
from utils.recipes.naming import LocalModels
from utils.recipes.routers import BASE, MERGE
from utils.runtime import gigabytes
from utils.workers.piece import Piece, Place

_HELD_OUT = 4  # every so many samples of a task are held out
_BY_LOSSES = "tasks count by their losses then"
_FEWEST = 2
_SEEN = (
    "held out: of these steps alone; where the start was measured on the same text, its files have seen these samples, so what "
    "it loses there is too little (utils/evaluator.py scores on text that neither saw)"
)
_ROUTERS = {BASE: "the base's", MERGE: "merged like everything else"}


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    start, held = _start(job), _held_out(job.config.nsamples)
    return [
        f"start: {job.options['start_recipe'] or 'the plain mean of the changes'} ({start.merge_method})"
        + (f", routers: {_ROUTERS[start.router]}" if start.router else ""),
        f"tuned: one coefficient for each expert and {job.options['tune_level']}, by at most {job.options['tune_steps']} "
        f"steps of Adam on {job.config.nsamples - held} samples of each task, judged on {held} others",
        f"disk: {gigabytes(_parts_bytes(job))} for what each expert adds, while measuring",
        *([_SEEN] if start.saliency else []),
    ]


def memory(job: MeasureJob) -> int:
    """Bytes on one device at the peak of a step, about: the base's way there and back with the samples of all tasks, the
    gradients summed up in float32, of a block or of what lies outside the blocks, and a part while they are multiplied by it."""
    needed = gradient_memory(job.base, [ids for expert in _experts(job) for ids in job.text(job.base, expert).encoded])
    model, blocks = job.base.decoder.model, job.base.decoder.blocks
    inside = [sum(value.numel() for value in block.parameters()) for block in blocks]
    around = sum(value.numel() for value in model.parameters()) - sum(inside)
    part = 4 * max(value.numel() for value in model.parameters())
    outside = 4 * around + max(needed.outside, part)
    return needed.held + max(needed.logits, needed.block + 4 * max(inside), outside)


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
    own = job.of(job.base, *experts)
    plan_parts(start, own.subjects[0], [one.entry for one in experts], _settings(job, job.devices[0]))
    blocks = len(job.base.decoder.blocks) * (2 * len(experts) + 3 * job.options["tune_steps"] + 1)
    types = (Tuned, Descent, Step, TextGain)
    (found,) = job.run([Piece("tuned", _tune, (own, start), blocks, "tuned", types)])
    for name, gain in found.gains.items() if not job.options[ACCEPT] else ():
        refuse_useless_text(name, gain, ACCEPT, _BY_LOSSES)  # what a run that accepted it has left
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
    doubts += [
        f"{name} has no sure gain over the base on its own text, which was accepted by --{ACCEPT}: tasks count by losses"
        for name, gain in found.gains.items()
        if not gain.is_sure
    ]
    return Measured(files, (note,), tuple(doubts))


@dataclass(frozen=True)
class Tuned:
    """Rows of the table of coefficients, how it went, and what experts gain."""

    rows: Sequence[tuple]
    descent: Descent
    gains: Mapping[str, TextGain]


@dataclass(frozen=True)
class _Samples:
    """Token ids of all tasks' samples in a row, each one's share of its task's predicted tokens, and its task's number."""

    ids: list[list[int]] = field(default_factory=list, repr=False)
    shares: list[float] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[list[int]], task: int) -> None:
        """Add the samples of a task."""
        total = sum(len(row) - 1 for row in ids)
        self.ids.extend(ids)
        self.shares.extend((len(row) - 1) / total for row in ids)
        self.tasks.extend([task] * len(ids))

    def by_task(self, losses: Sequence[float]) -> list[float]:
        """The mean loss per token of each task."""
        found = [0.0] * (max(self.tasks) + 1)
        for loss, share, task in zip(losses, self.shares, self.tasks, strict=True):
            found[task] += share * loss
        return found


def _tune(place: Place, job: MeasureJob, start: Start) -> Tuned:
    with TemporaryDirectory(dir=place.folder) as folder:
        return _tuned(place, job, start, Path(folder))


def _tuned(place: Place, job: MeasureJob, start: Start, folder: Path) -> Tuned:
    device, on_block = place.device, place.on_step
    base, *experts = job.subjects
    resumed = read_state(place.snapshot)
    gains = {} if resumed is None else {name: TextGain(*own) for name, own in resumed["gains"].items()}
    gains = gains or {expert.entry.type: _gain(job, base, expert, place) for expert in experts}
    works = plan_parts(start, base, [one.entry for one in experts], _settings(job, device))
    parts = write_parts(works, base, folder)
    stepped, held = _Samples(), _Samples()
    for task, expert in enumerate(experts):
        ids = job.text(base, expert).encoded
        first = len(ids) - _held_out(len(ids))
        stepped.add(ids[:first], task)
        held.add(ids[first:], task)
    groups = torch.tensor(group_numbers(parts.names, job.options["tune_level"], base.decoder.blocks_path))

    def summed(table: Tensor) -> SummedWeights:
        coefficients = {
            type_: dict(zip(parts.names, row[groups].tolist(), strict=True))
            for type_, row in zip(parts.headers, table, strict=True)
        }
        return SummedWeights(job.open_weights(base, device), parts, coefficients, device)

    def slope(table: Tensor, weigh: Weigh) -> tuple[list[float], Tensor]:
        losses, found = _slope(base, summed(table), parts, stepped, weigh, place)
        by_group = torch.zeros(table.shape, dtype=torch.float64)
        return losses, by_group.index_add_(1, groups, found)

    def held_out(table: Tensor) -> list[float]:
        source = summed(table)
        with backward_pass(
            base.decoder, source, held.ids, _Nothing(), device, on_block=on_block, folder=place.folder
        ) as model:
            return held.by_task(model.losses)

    asked = Asked(
        steps=job.options["tune_steps"],
        rate=job.options["tune_rate"],
        pull=job.options["tune_pull"],
        worst=job.options["tune_for"] == "worst",
    )
    sure = all(one.is_sure for one in gains.values())
    divisors = [one.gain if sure else 1.0 for one in gains.values()]
    least = [one.expert for one in gains.values()]

    def keep(state: dict[str, Any]) -> None:
        if place.snapshot is not None:
            write_state(
                place.snapshot, {"gains": {name: astuple(one) for name, one in gains.items()}, "descent": state}
            )

    shape, before = (len(experts), int(groups.max()) + 1), resumed and resumed["descent"]
    descent = descend(shape, asked, least, divisors, slope, held_out, before, keep)
    return Tuned(_rows(base, parts, descent.coefficients[:, groups]), descent, gains)


def _slope(
    base: Subject,
    weights: SummedWeights,
    parts: Parts,
    samples: _Samples,
    weigh: Weigh,
    place: Place,
) -> tuple[list[float], Tensor]:
    """Losses by task of a merged model, and the gradient of their weighed sum by every coefficient."""
    by_sample: list[float] = []
    observer = CoefficientSlopes(parts, weights, by_sample)
    with backward_pass(
        base.decoder,
        weights,
        samples.ids,
        observer,
        place.device,
        outside=True,
        on_block=place.on_step,
        folder=place.folder,
    ) as model:
        losses = samples.by_task(model.losses)
        by_task = weigh(losses)
        by_sample += [share * by_task[task] for share, task in zip(samples.shares, samples.tasks, strict=True)]
        for _ in model.blocks:
            pass
    return losses, observer.found


def _gain(job: MeasureJob, base: Subject, expert: Subject, place: Place) -> TextGain:
    losses, device = [], place.device
    for subject in (base, expert):
        ids = job.text(subject, expert).encoded
        with backward_pass(
            subject.decoder,
            job.open_weights(subject, device),
            ids,
            _Nothing(),
            device,
            on_block=place.on_step,
            folder=place.folder,
        ) as model:
            losses.append(model.losses)
    gain = text_gain([len(row) - 1 for row in job.text(expert, expert).encoded], *losses)
    if not job.options[ACCEPT]:
        refuse_useless_text(f"model {expert.entry.name} ({expert.entry.type})", gain, ACCEPT, _BY_LOSSES)
    return gain


class _Nothing:
    """Looks at no gradient (a `GradientObserver`)."""

    def wants(self, name: str) -> bool:
        return False

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor, sample: int) -> None:
        """Never called."""

    def finish(self, layer: int | None, parameters: Mapping[str, Tensor]) -> None:
        """Nothing to take."""


def _settings(job: MeasureJob, device: torch.device) -> MergeSettings:
    return MergeSettings(Path("tuned"), Path("tuned"), device=str(device), trust_remote_code=job.trust_remote_code)


def _experts(job: MeasureJob) -> tuple[Subject, ...]:
    return tuple(job.subject(entry) for entry in experts_to_merge(job.config))


def _start(job: MeasureJob) -> Start:
    entries, path = [one.entry for one in _experts(job)], job.options["start_recipe"]
    models = LocalModels(job.config.base, entries, trust_remote_code=job.trust_remote_code)
    return plain_start(entries, models) if path is None else read_start(Path(path), job.base.entry, entries, models)


def _held_out(samples: int) -> int:
    return max(1, samples // _HELD_OUT)


def _rows(base: Subject, parts: Parts, coefficients: Tensor) -> list[tuple]:
    decoder, components, rows = base.decoder, component_names(base), []
    for type_, own in zip(parts.headers, coefficients.tolist(), strict=True):
        for name, value in zip(parts.names, own, strict=True):
            layer = name.removeprefix(f"{decoder.blocks_path}.").split(".")[0]
            for header in base.layout.headers(name):  # an expert's matrices each on its own, with one coefficient
                place = (int(layer) if layer.isdigit() else -1, components.get(header.name, ""), header.name)
                rows.append((type_, *place, math.prod(header.shape), value))
    return rows


def _step_rows(descent: Descent, tasks: Sequence[str]) -> list[tuple]:
    return [
        (number, task, samples, losses[place], step.lost, int(number == descent.best))
        for number, step in enumerate(descent.steps)
        for place, task in enumerate(tasks)
        for samples, losses in zip(SAMPLES, (step.losses, step.held_out), strict=True)
        if losses is not None
    ]
