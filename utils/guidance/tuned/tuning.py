"""Steps of gradient descent on the coefficients of a merge's parts, as a piece of work."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from utils.guidance.measure_job import MeasureJob
from utils.guidance.own_text import Losses
from utils.guidance.text_gain import TextGain
from utils.guidance.tuned.descent import Asked, Descent, Weigh, descend
from utils.guidance.tuned.method import LEVEL
from utils.guidance.tuned.parts import Parts, SummedWeights, plan_parts, write_parts
from utils.guidance.tuned.slopes import CoefficientSlopes, group_numbers
from utils.guidance.tuned.start import Start
from utils.mergekit_api import merge_method
from utils.merging.pieces.choice import reason_against
from utils.merging.settings import MergeSettings
from utils.passes.block_gradients import backward_pass
from utils.passes.sample_losses import sample_losses
from utils.passes.snapshots import read_state, write_state
from utils.passes.subjects import Subject, component_names
from utils.workers.piece import Place

_HELD_OUT = 4  # every so many samples of a task are held out


@dataclass(frozen=True)
class Tuned:
    """Rows of the table of coefficients, and how it went."""

    rows: Sequence[tuple]
    descent: Descent


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


def held_out_of(samples: int) -> int:
    """How many of a task's samples judge the steps."""
    return max(1, samples // _HELD_OUT)


def settings_of(job: MeasureJob, device: torch.device, start: Start) -> MergeSettings:
    """Of the merges that give the parts, which go to files: plain changes come out in pieces, where the files are, whatever
    device computes; mergekit's executor would take eight numbers in float32 for each of a tensor's there."""
    settings = MergeSettings(Path("tuned"), Path("tuned"), device=str(device), trust_remote_code=job.trust_remote_code)
    in_pieces = start.is_plain and reason_against(settings, merge_method(start.merge_method)) is None
    return replace(settings, device="cpu") if in_pieces else settings


def tune(
    place: Place, job: MeasureJob, start: Start, gains: Mapping[str, TextGain], losses: Mapping[str, Losses]
) -> Tuned:
    """Write the parts of a start and tune their coefficients.

    Args:
        place: where; the descent goes on from its snapshot.
        job: of the base and the experts to merge alone.
        start: the merge to start from.
        gains: what experts gain, by type: what losses are divided by, if all are sure.
        losses: each expert's by sample of its text: what a step loses is counted from them, on the same samples.

    Raises:
        UserError: as `plan_parts` and `backward_pass`.
    """
    with TemporaryDirectory(dir=place.folder) as folder:
        return _tuned(place, job, start, gains, losses, Path(folder))


def _tuned(
    place: Place,
    job: MeasureJob,
    start: Start,
    gains: Mapping[str, TextGain],
    losses: Mapping[str, Losses],
    folder: Path,
) -> Tuned:
    device = place.device
    base, *experts = job.subjects
    base = replace(base, experts_apart=job.open_weights(base, device).experts_apart)  # decided for all steps alike
    works = plan_parts(start, base, [one.entry for one in experts], settings_of(job, device, start))
    parts = write_parts(works, base, folder)
    stepped, held = _Samples(), _Samples()
    by_experts: tuple[list[float], list[float]] = [], []
    for task, expert in enumerate(experts):
        ids = job.text(base, expert).encoded
        first = len(ids) - held_out_of(len(ids))
        own = losses[expert.entry.type]
        for samples, part, found in zip((stepped, held), (slice(first), slice(first, None)), by_experts, strict=True):
            samples.add(ids[part], task)
            found.extend(own[part])
    stored = [base.layout.stored_names(name) for name in parts.names]
    groups = torch.tensor(group_numbers(parts.names, stored, job.options[LEVEL], base.decoder.blocks_path))

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
        return held.by_task(sample_losses(base.decoder, lambda: summed(table), held.ids, device, place.on_step))

    asked = Asked(
        steps=job.options["tune_steps"],
        rate=job.options["tune_rate"],
        pull=job.options["tune_pull"],
        worst=job.options["tune_for"] == "worst",
    )
    own_gains = [gains[expert.entry.type] for expert in experts]
    sure = all(one.is_sure for one in own_gains)
    divisors = [one.gain if sure else 1.0 for one in own_gains]
    least = stepped.by_task(by_experts[0]), held.by_task(by_experts[1])

    def keep(state: dict[str, Any]) -> None:
        if place.snapshot is not None:
            write_state(place.snapshot, state)

    shape, before = (len(experts), int(groups.max()) + 1), read_state(place.snapshot)
    descent = descend(shape, asked, least, divisors, slope, held_out, before, keep)
    return Tuned(_rows(base, parts, descent.coefficients[:, groups]), descent)


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
        label="the merge that is tuned",
    ) as model:
        losses = samples.by_task(model.losses)
        by_task = weigh(losses)
        by_sample += [share * by_task[task] for share, task in zip(samples.shares, samples.tasks, strict=True)]
        for _ in model.blocks:
            pass
    return losses, observer.found


def _rows(base: Subject, parts: Parts, coefficients: Tensor) -> list[tuple]:
    decoder, components, rows = base.decoder, component_names(base), []
    for type_, own in zip(parts.headers, coefficients.tolist(), strict=True):
        written: set[str] = set()
        for name, value in zip(parts.names, own, strict=True):
            layer = name.removeprefix(f"{decoder.blocks_path}.").split(".")[0]
            for header in base.layout.headers(name):  # an expert's matrices each on its own, with one coefficient
                if header.name in written:  # several parameters are made of it, with one coefficient
                    continue
                written.add(header.name)
                place = (int(layer) if layer.isdigit() else -1, components.get(header.name, ""), header.name)
                rows.append((type_, *place, math.prod(header.shape), value))
    return rows
