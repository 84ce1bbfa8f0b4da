"""Whether experts are better than the base on text of their own, from the passes that give the norms: the head alone comes on top.

Text is an expert's own if the pair config gives it to that expert, and to no other, under calibration. Where blocks are
pruned while they are measured their losses are not the models', so that a way forward of each model is made before.
"""

from collections.abc import Mapping, Sequence

from utils.guidance.measure_job import MeasureJob
from utils.guidance.own_text import Answer, both_forward, gains_on_own_text, not_asked_line, own_text_of, without_head
from utils.guidance.text_gain import TextGain
from utils.pair.batches import sample_order
from utils.passes.subjects import Subject


def asked(job: MeasureJob) -> tuple[Subject, ...]:
    """The experts with text of their own that can be asked."""
    return tuple(expert for expert in _with_own_text(job) if not _in_the_way(job, expert))


def not_asked_lines(job: MeasureJob) -> list[str]:
    """A sentence for each expert with text of its own that cannot be asked."""
    found = [(expert.entry.type, _in_the_way(job, expert)) for expert in _with_own_text(job)]
    return [not_asked_line(name, why) for name, why in found if why]


def gains_before(job: MeasureJob) -> Mapping[str, TextGain]:
    """What experts gain, where the passes that give the norms cannot say it. Raises as `gains_on_own_text`."""
    return gains_on_own_text(job, asked(job), both_forward).gains if job.config.sparsity_ratio else {}


def is_scored(job: MeasureJob, subject: Subject, users: Sequence[str]) -> bool:
    """Whether a model's pass over the text of `users` (types of experts) goes through the head, too."""
    experts = () if job.config.sparsity_ratio else asked(job)
    models = (job.config.base.type, *users)
    return subject.entry.type in models and any(expert.entry.type in users for expert in experts)


def gains_of_passes(job: MeasureJob, losses: Mapping[tuple[str, str], Sequence[float]]) -> Mapping[str, TextGain]:
    """What experts gain.

    Args:
        job: the whole job.
        losses: of each sample in the order of the micro-batches, by types of model and of the expert whose text it is.

    Raises:
        UserError: as `own_text_of`.
    """

    def in_order(subject: Subject, expert: Subject) -> tuple[float, ...]:
        places = sample_order(job.text(subject, expert).encoded)
        own = dict(zip(places, losses[subject.entry.type, expert.entry.type], strict=True))
        return tuple(own[place] for place in range(len(places)))

    answers = {one.entry.type: Answer(in_order(job.base, one), in_order(one, one)) for one in asked(job)}
    return own_text_of(job, answers).gains


def _with_own_text(job: MeasureJob) -> list[Subject]:
    config = job.config
    texts = [config.text_of(entry.type) for entry in config.experts]
    return [
        job.subject(entry)
        for entry in config.experts
        if entry.type in config.calibration and texts.count(config.text_of(entry.type)) == 1
    ]


def _in_the_way(job: MeasureJob, expert: Subject) -> str:
    """Why an expert cannot be asked, as a clause; "" if it can."""
    if job.config.parity:
        return "pads are attended with parity: reference"
    if why := without_head(job, expert):
        return why
    is_short = any(max(map(len, job.text(one, expert).encoded)) < 2 for one in (job.base, expert))
    return "no sample has a next token" if is_short else ""
