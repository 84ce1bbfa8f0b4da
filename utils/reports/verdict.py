"""One sentence that says whether the merge helped, made from the numbers, and the sentences that belong to it."""

from collections.abc import Sequence

from utils.reports.formats import interval, number, percent
from utils.reports.tables import outcome_of
from utils.reports.values import Estimate, Outcome, Standing, Verdict, is_known


def judge(
    winner: str,
    reference: str,
    standings: Sequence[Standing],
    reference_is: str = "",
    *,
    recommended: bool = True,
    gain: str = "the experts' gain over the base",
) -> Verdict:
    """The verdict on one contender.

    Args:
        winner: whom it is on.
        reference: what it is compared with; may be the same, if nothing is better, or empty, if there is nothing.
        standings: with both among them; the winner's `difference` is against the reference.
        reference_is: what the reference is, in words; empty where its name says it.
        recommended: whether it is what validation rows chose; of a reference that is not, nothing more is said.
        gain: what the standings' `gain` is a share of.

    Raises:
        ValueError: the winner has no standing.
    """
    found = {one.contender: one for one in standings}
    if winner not in found:
        raise ValueError(f"{winner!r} has no standing")
    ours = found[winner]
    if not ours.gain.known:
        return Verdict(f"{winner} could not be scored.", None)
    named = ", ".join(filter(None, [reference, reference_is]))
    keeps = f"keeps {percent(ours.gain.value)} of {gain}"
    if ours.gain.value < 0:
        keeps = f"is worse than the base, by {percent(-ours.gain.value)} of {gain}"
    if winner == reference and not recommended:
        what = ", ".join(filter(None, ["the reference", reference_is]))
        return Verdict(f"{winner} is {what}: it {keeps}.", None, _details(ours))
    if winner == reference:
        return Verdict(
            f"On validation rows nothing was better than {named}: on test rows it {keeps}.",
            Outcome.UNCLEAR,
            _details(ours),
        )
    if reference not in found or ours.difference is None or not ours.difference.known:
        return Verdict(f"{winner} {keeps}.", None, _details(ours))
    outcome = outcome_of(ours.difference, ours.p, higher_is_better=True)
    than = "" if outcome else f" than {reference}"  # which stands at the beginning already, else
    apart = _apart(ours.difference, than)
    keeps = f"{keeps}, {apart}"
    if ours.gain.value < 0:
        below = "and yet is" if outcome is Outcome.BETTER else "and is"
        keeps = f"keeps {apart}, {below} worse than the base, by {percent(-ours.gain.value)} of {gain}"
    start = {
        Outcome.BETTER: f"{winner} is better than {named}: it ",
        Outcome.WORSE: f"{winner} is worse than {named}: it ",
        Outcome.UNCLEAR: f"No difference seen between {winner} and {named}: {winner} ",
        None: f"{winner} ",
    }[outcome]
    return Verdict(f"{start}{keeps}.", outcome, _details(ours))


def _apart(difference: Estimate, than: str) -> str:
    """How far ahead or behind, in percentage points."""
    size = number(100 * abs(difference.value), 1)
    within = interval(difference, 1, scale=100.0, signed=True)
    side = "more" if difference.value >= 0 else "less"
    return f"{size} points {side}{than}" + (f" (95% interval {within})" if within else "")


def _details(ours: Standing) -> tuple[str, ...]:
    """The worst task and what was forgotten, as far as they are known."""
    said = []
    if is_known(ours.worst) and ours.worst_task:
        share = percent(ours.worst)
        below = ", below the base" if ours.worst < 0 else ""
        said.append(f"Its worst task is {ours.worst_task}, where it keeps {share} of the expert's gain{below}.")
    if ours.forgetting is not None and ours.forgetting.known:
        change = ours.forgetting
        within = interval(change, 3, signed=True)
        shown = number(change.value, 3, signed=True) + (f" (95% interval {within})" if within else "")
        outcome = outcome_of(change, None, higher_is_better=False)
        meaning = f", {outcome}" if outcome else ""
        said.append(f"On general text its loss differs from the base's by {shown} nats per token{meaning}.")
    return tuple(said)
