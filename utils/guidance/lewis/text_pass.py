"""One model's pass over a text, or a range of it, as a piece of work: its norms or sums, and the trial of rounding beside it."""

from typing import Any

from utils.guidance.few_tokens import fewest_tokens
from utils.guidance.lewis.noise import Norms, RoundingTrial, VisitorWithTrial, is_rounded, trial_batch
from utils.guidance.lewis.ranges import RangeVisitor
from utils.guidance.lewis.visitor import LewisVisitor
from utils.guidance.measure_job import MeasureJob
from utils.guidance.routing import compared_routers, routing_rows
from utils.passes.block_runner import Visitor, run_blocks
from utils.passes.routing import VisitorWithRouters
from utils.passes.sample_losses import losses_behind
from utils.passes.snapshots import Snapshots
from utils.passes.subjects import EncodedText, Subject
from utils.workers.piece import Place


def measured_norms(place: Place, job: MeasureJob, divisor: int, base: Subject | None, scored: bool) -> dict[str, Any]:
    """`norms` of linear parts and of experts' `stacks` by layer and component of a model on a text, and its `trial`.

    With a base, `routing` has rows of the table of routers. If `scored`, `losses` are those of the samples in the order of
    the micro-batches, else ().
    """
    (subject,) = job.subjects
    (text,) = subject.texts.values()
    visitor = LewisVisitor(
        subject.decoder,
        text.tokens,
        divisor,
        job.config.sparsity_ratio,
        subject.layout,
        passing_over=job.config.components is None,
        fewest_tokens=fewest_tokens(job.options),
    )
    routing: list[tuple] = []
    if base is None:
        passed = _run(place, job, subject, text, visitor, tried=True, scored=scored)
    else:
        with compared_routers(job, subject, base, place.device) as routers:
            both = VisitorWithRouters(visitor, routers)
            passed = _run(place, job, subject, text, both, tried=True, scored=scored)
            routing = routing_rows(subject.entry.type, routers)
    stacks = {key: one.on_cpu() for key, one in visitor.stacks.items()}
    return {
        "norms": {key: norm.cpu() for key, norm in visitor.norms.items()},
        "stacks": stacks,
        "routing": routing,
        **passed,
    }


def range_sums(place: Place, job: MeasureJob, first: bool, scored: bool) -> dict[str, Any]:
    """Sums of one model over one range of a text (`RangeVisitor.result`), the `trial` of the first one, and `losses`."""
    (subject,) = job.subjects
    (text,) = subject.texts.values()
    visitor = RangeVisitor(subject.decoder, text.tokens, squares=first)
    passed = _run(place, job, subject, text, visitor, tried=first, scored=scored)
    return {**visitor.result(), **passed}


def _run(
    place: Place, job: MeasureJob, subject: Subject, text: EncodedText, visitor: Visitor, *, tried: bool, scored: bool
) -> dict[str, Any]:
    """Take a text through the blocks; in 16 bits, if `tried`, its first samples in float32 beside it; if `scored`, through
    the head, too.

    Returns:
        Of the `trial` `norms` by layer and component, (in 16 bits, in float32) each, none if there was none, and `seconds` both
        ways; `losses` by sample in the order of the micro-batches, () if not `scored`.
    """
    weights = job.open_weights(subject, place.device)
    going_on = {
        "on_block": place.on_step,
        "snapshots": None if isinstance(visitor, RangeVisitor) else Snapshots(place.snapshot),
    }
    if not tried or not is_rounded(subject.dtype):
        finals = run_blocks(subject.decoder, weights, text.batches, visitor, place.device, **going_on)
        trial = {"norms": {}, "seconds": (0.0, 0.0)}
    else:
        with RoundingTrial(subject.decoder, trial_batch(text.batches), place.device) as rounding:
            both = VisitorWithTrial(visitor, rounding)
            finals = run_blocks(subject.decoder, weights, text.batches, both, place.device, **going_on)
        norms: Norms = {key: (float(rounded), float(exact)) for key, (rounded, exact) in rounding.norms.items()}
        trial = {"norms": norms, "seconds": tuple(rounding.seconds)}
    losses: tuple[float, ...] = ()
    if scored:
        head = job.open_weights(subject, place.device)
        losses = losses_behind(subject.decoder, head, text.batches, finals, place.device)
    return {"trial": trial, "losses": losses}
