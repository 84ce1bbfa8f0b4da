"""Whether experts are better than the base on their own text, asked the same way by every guidance that measures on such text.

A method whose passes give a loss takes it from there, as soon as the way forward has ended; a loss that they do not give is
that of a way forward alone (`forward_losses`), which takes about a quarter of what a way there and back takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from utils.guidance.measure_job import MeasureJob
from utils.guidance.routing import compared_routers, routing_rows
from utils.guidance.text_gain import ACCEPT, TextGain, refuse_useless_text, text_gain
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import Bystander, Visitor, run_blocks
from utils.passes.gradient_refusals import refuse_short
from utils.passes.language_head import fetch_head, language_head
from utils.passes.routing import VisitorWithRouters
from utils.passes.subjects import Subject
from utils.workers.piece import Piece, Place

_PIECE = "+gain"  # behind an expert's type, which holds no +
_LOGITS_AT_ONCE = 2**23


@dataclass(frozen=True)
class OwnText:
    """What an expert gains on its own text, and rows of the table of routers, none of models that are no mixtures."""

    gain: TextGain
    routing: tuple[tuple, ...]


def gain_on_own_text(job: MeasureJob, expert: Subject, base: Sequence[float], own: Sequence[float]) -> TextGain:
    """What an expert gains, from the losses of base and expert by sample of its text.

    Raises:
        UserError: it is not surely better than the base, and that was not accepted.
    """
    gain = text_gain([len(ids) - 1 for ids in job.text(expert, expert).encoded], base, own)
    if not job.options[ACCEPT]:
        refuse_useless_text(f"model {expert.entry.name} ({expert.entry.type})", gain, ACCEPT)
    return gain


def gains_by_way_forward(job: MeasureJob) -> dict[str, OwnText]:
    """What every expert gains, by type, from a way forward of it and of the base; a piece of work for each.

    The expert's routers are compared with the base's on its way.

    Raises:
        UserError: as `gain_on_own_text`.
    """
    pieces = [
        Piece(
            f"{expert.entry.type}{_PIECE}",
            on_own_text,
            (job.of(job.base, expert),),
            2 * len(expert.decoder.blocks),
            expert.entry.type,
            types=(OwnText, TextGain),
        )
        for expert in job.experts
    ]
    return dict(zip((expert.entry.type for expert in job.experts), job.run(pieces), strict=True))


def accepted_doubts(job: MeasureJob, gains: Mapping[str, TextGain]) -> list[str]:
    """A sentence for each expert whose gain is not sure.

    Raises:
        UserError: there is one, and that was not accepted: a run that accepted it has left its result.
    """
    for name, gain in gains.items() if not job.options[ACCEPT] else ():
        refuse_useless_text(name, gain, ACCEPT)
    return [
        f"{name} has no sure gain over the base on its own text (loss {gain.expert:.4f}, base {gain.base:.4f}), which was "
        f"accepted by --{ACCEPT}"
        for name, gain in gains.items()
        if not gain.is_sure
    ]


def on_own_text(place: Place, job: MeasureJob) -> OwnText:
    """What an expert gains, from a way forward of the base and of the expert; the job is of these two.

    Raises:
        UserError: as `gain_on_own_text`.
    """
    base, expert = job.subjects
    before = forward_losses(place, job, base, expert)
    with compared_routers(job, expert, base, place.device) as routers:
        losses = forward_losses(place, job, expert, expert, VisitorWithRouters(Bystander(), routers))
        return OwnText(gain_on_own_text(job, expert, before, losses), tuple(routing_rows(expert.entry.type, routers)))


@torch.inference_mode()
def forward_losses(
    place: Place, job: MeasureJob, subject: Subject, expert: Subject, visitor: Visitor | None = None
) -> tuple[float, ...]:
    """The mean loss of each sample of an expert's text at a model: nats per predicted token, float32 from the logits on; 0
    of one without a next token. `visitor` is what observes the blocks on the way.

    Memory: that of `run_blocks`, then the head and a piece of the logits.

    Raises:
        UserError: no sample has a next token; as `run_blocks`.
    """
    decoder, device, found = subject.decoder, place.device, []
    samples = job.text(subject, expert).encoded
    if max(map(len, samples)) < 2:
        refuse_short(samples)
    batches = [MicroBatch.of([ids]) for ids in samples]  # one each: no pads, and the samples' order
    weights = job.open_weights(subject, device)
    finals = run_blocks(decoder, weights, batches, visitor or Bystander(), device, on_block=place.on_step)
    at_once = max(1, _LOGITS_AT_ONCE // decoder.model.get_input_embeddings().weight.shape[0])
    with language_head(decoder, fetch_head(decoder, job.open_weights(subject, device)), device) as to_logits:
        for ids, final in zip(samples, finals, strict=True):
            total = torch.zeros((), dtype=torch.float64, device=device)
            targets = torch.tensor(ids[1:], device=device)
            for states, own in zip(final[0, :-1].split(at_once), targets.split(at_once), strict=True):
                total += cross_entropy(to_logits(states).float(), own, reduction="sum")
            found.append(float(total) / max(1, len(targets)))
    return tuple(found)
