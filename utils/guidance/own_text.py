"""Whether experts are better than the base on their own text, asked of all of them before anything else is measured.

A method that takes models there and back asks after the way there, which the measuring goes on from: its hidden states wait
on disk meanwhile, and nothing is computed twice (where they do not all fit, the ways there are computed again, and that is
said). For others it is a way forward alone (`both_forward`), about a quarter of what a way there and back takes. Every useless
expert is named at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from utils.errors import UserError
from utils.guidance.measure_job import MeasureJob
from utils.guidance.routing import compared_routers, routing_rows
from utils.guidance.text_gain import ACCEPT, GOES_BY_IT, TextGain, refuse_useless_text, text_gain
from utils.models.weight_source import WeightSource
from utils.passes.block_runner import Bystander, Visitor
from utils.passes.gradient_refusals import refuse_short
from utils.passes.language_head import absent_of_head
from utils.passes.routing import VisitorWithRouters
from utils.passes.sample_losses import sample_losses
from utils.passes.subjects import Subject
from utils.publishing.disk import bytes_on_disk, free_bytes
from utils.runtime import gigabytes
from utils.workers.piece import Piece, Place

Losses = tuple[float, ...]
"""The mean loss of each sample of a text, nats per predicted token."""


@dataclass(frozen=True)
class Answer:
    """The losses of base and expert on the expert's text; and rows of the table of routers, where the way has them."""

    base: Losses
    expert: Losses
    routing: tuple[tuple, ...] = ()


@dataclass(frozen=True)
class OwnText:
    """What experts gain on their own text, by type, and all rows of the table of routers that asking gave.

    `losses` are each expert's by sample; `not_asked` holds a sentence for each expert that could not be asked.
    """

    gains: Mapping[str, TextGain]
    losses: Mapping[str, Losses]
    routing: tuple[tuple, ...] = ()
    not_asked: tuple[str, ...] = ()


Ask = Callable[[Place, MeasureJob], Answer]
"""Given where, and a job of base and expert alone. What it leaves in the place's snapshot is found in that of the piece that
has the expert's type as its name."""


def gains_on_own_text(
    job: MeasureJob,
    experts: Sequence[Subject],
    ask: Ask,
    *,
    then: str = GOES_BY_IT,
    left: int = 0,
    least: int = 0,
    piece: str = "gain",
) -> OwnText:
    """What every expert gains; a piece of work for each, with two steps a block.

    Args:
        job: the whole job.
        experts: those to ask; not asked is one where it or the base lacks a head, without which there is no loss.
        ask: gives the losses.
        then: what comes of useless experts that are accepted, as a clause.
        left: bytes that `ask` leaves on disk for what goes on with it, of all experts; nothing is left where `least` bytes,
            which the rest of the measuring needs, do not fit beside them.
        piece: what its pieces are called behind an expert's type and a +, which no type holds; ways whose losses may differ in
            the last bits have their own.

    Raises:
        UserError: experts that are not surely better than the base, and that was not accepted.
    """
    keeps = _fits(job, left + least)
    headless = {expert.entry.type: why for expert in experts if (why := without_head(job, expert))}
    experts = [expert for expert in experts if expert.entry.type not in headless]
    pieces = [
        Piece(
            f"{expert.entry.type}+{piece}",
            _asked,
            (job.of(job.base, expert), ask, keeps),
            2 * len(expert.decoder.blocks),
            expert.entry.type,
            types=(Answer,),
            before=expert.entry.type,
        )
        for expert in experts
    ]
    found = own_text_of(job, dict(zip((expert.entry.type for expert in experts), job.run(pieces), strict=True)), then)
    return replace(found, not_asked=tuple(not_asked_line(*one) for one in headless.items()))


def without_head(job: MeasureJob, expert: Subject) -> str:
    """Why there is no loss of the base or of an expert, as a clause; "" if both have a head."""
    for subject in (job.base, expert):
        if absent := absent_of_head(subject.decoder, subject.layout):
            return f"the checkpoint of {subject.entry.name} has no {', '.join(absent)}"
    return ""


def not_asked_line(name: str, why: str) -> str:
    """A sentence about an expert that is not asked, and why, a clause."""
    return f"{name}: whether it is better than the base on its text is not asked: {why}"


def own_text_of(job: MeasureJob, answers: Mapping[str, Answer], then: str = GOES_BY_IT) -> OwnText:
    """What experts gain, from answers by type. Raises as `gains_on_own_text`: a run that accepted useless text may have left them."""
    gains, named = {}, {}
    for expert in job.experts:
        if own := answers.get(name := expert.entry.type):
            if not all(map(math.isfinite, (*own.base, *own.expert))):
                raise UserError(
                    f"model {expert.entry.name}: its loss on its own text, or the base's there, is not finite in "
                    f"{expert.dtype}; check the checkpoints, or use --dtype float32 or bfloat16",
                    "measured-not-finite",
                )
            tokens = [len(ids) - 1 for ids in job.text(expert, expert).encoded]
            gains[name] = named[f"model {expert.entry.name} ({name})"] = text_gain(tokens, own.base, own.expert)
    if named and not job.options[ACCEPT]:
        refuse_useless_text(named, ACCEPT, then)
    losses = {name: answers[name].expert for name in gains}
    return OwnText(gains, losses, tuple(row for own in answers.values() for row in own.routing))


def accepted_doubts(gains: Mapping[str, TextGain], then: str = GOES_BY_IT) -> list[str]:
    """A sentence for each expert whose gain is not sure, which was accepted, and for each that one sample says it of; `then` as
    in `gains_on_own_text`."""
    one = [
        f"{name}: its gain over the base is that of 1 sample, which says nothing of how sure it is; give more (nsamples)"
        for name, gain in gains.items()
        if gain.is_sure and gain.samples == 1
    ]
    return one + [
        f"{name} has no sure gain over the base on its own text (loss {gain.expert:.4f}, base {gain.base:.4f}), which was "
        f"accepted by --{ACCEPT}: {then}"
        for name, gain in gains.items()
        if not gain.is_sure
    ]


def both_forward(place: Place, job: MeasureJob) -> Answer:
    """The losses of base and expert by a way forward of each (an `Ask`)."""
    return Answer(forward_losses(place, job, *job.subjects), *expert_forward(place, job))


def expert_forward(place: Place, job: MeasureJob) -> tuple[Losses, tuple[tuple, ...]]:
    """The losses of an expert by a way forward, and rows of the table of routers, which are compared with the base's on it."""
    base, expert = job.subjects
    with compared_routers(job, expert, base, place.device) as routers:
        losses = forward_losses(place, job, expert, expert, VisitorWithRouters(Bystander(), routers))
        return losses, tuple(routing_rows(expert.entry.type, routers))


def _fits(job: MeasureJob, needed: int) -> bool:
    """Whether there is room for what the ways there leave."""
    if job.workspace is None:
        return False
    free = free_bytes(job.workspace)[0] + bytes_on_disk(job.workspace)
    if free < needed and not job.quiet:
        print(
            f"the ways forward of all experts would leave {gigabytes(needed - free)} more than there is room for, so they "
            "are computed once more when each expert is measured"
        )
    return free >= needed


def _asked(place: Place, job: MeasureJob, ask: Ask, keeps: bool) -> Answer:
    return ask(place if keeps else replace(place, snapshot=None), job)


def forward_losses(
    place: Place, job: MeasureJob, subject: Subject, expert: Subject, visitor: Visitor | None = None
) -> Losses:
    """The loss of each sample of an expert's text at a model, by a way forward alone; `visitor` observes the blocks on it.

    Raises:
        UserError: no sample has a next token; as `sample_losses`.
    """
    samples = job.text(subject, expert).encoded
    if max(map(len, samples)) < 2:
        refuse_short(samples)

    def weights() -> WeightSource:
        return job.open_weights(subject, place.device)

    return sample_losses(subject.decoder, weights, samples, place.device, place.on_step, visitor)
