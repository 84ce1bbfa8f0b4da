"""The sentence at the head of a page agrees with the numbers it is made from."""

import pytest

from utils.reports.values import Estimate, Outcome, Standing
from utils.reports.verdict import judge


def standings(ours: Estimate, difference: Estimate | None, p: float | None = None, **more) -> list[Standing]:
    return [Standing("plain", Estimate(0.35)), Standing("ours", ours, difference, p, **more)]


def test_better():
    apart = standings(Estimate(0.56), Estimate(0.21, 0.172, 0.248))
    found = judge("ours", "plain", apart, "the best uniform merge")
    assert found.outcome is Outcome.BETTER
    assert found.sentence == (
        "ours is better than plain, the best uniform merge: it keeps 56.0% of the experts' gain over the base, "
        "21.0 points more (95% interval +17.2 to +24.8)."
    )


def test_a_reference_may_be_its_name_alone():
    found = judge("ours", "plain", standings(Estimate(0.56), Estimate(0.21, 0.172, 0.248)))
    assert found.sentence.startswith("ours is better than plain: it keeps 56.0%")


def test_an_interval_that_holds_zero_is_no_difference():
    found = judge("ours", "plain", standings(Estimate(0.36), Estimate(0.01, -0.02, 0.04)))
    assert found.outcome is Outcome.UNCLEAR and found.sentence.startswith("No difference seen")


def test_a_corrected_p_has_the_last_word():
    found = judge("ours", "plain", standings(Estimate(0.40), Estimate(0.05, 0.01, 0.09), p=0.08))
    assert found.outcome is Outcome.UNCLEAR


def test_worse_than_the_base_is_said():
    found = judge(
        "ours", "plain", standings(Estimate(-0.65), Estimate(-1.0, -1.1, -0.9), worst=-0.9, worst_task="code")
    )
    assert found.outcome is Outcome.WORSE
    assert "worse than the base" in found.sentence and "100.0 points less" in found.sentence
    assert "below the base" in found.details[0] and "code" in found.details[0]


def test_better_and_yet_worse_than_the_base():
    found = judge("ours", "plain", standings(Estimate(-0.12), Estimate(0.1, 0.05, 0.15)))
    assert found.outcome is Outcome.BETTER
    assert found.sentence == (
        "ours is better than plain: it keeps 10.0 points more (95% interval +5.0 to +15.0), and yet is worse than the base, by "
        "12.0% of the experts' gain over the base."
    )


def test_the_reference_itself_may_be_the_best():
    found = judge("plain", "plain", standings(Estimate(0.1), None))
    assert found.sentence.startswith("On validation rows nothing was better than plain") and "35.0%" in found.sentence


def test_a_reference_that_was_not_chosen_is_not_said_to_be_the_best():
    found = judge("plain", "plain", standings(Estimate(0.1), None), "the best uniform merge", recommended=False)
    assert found.sentence.startswith("plain is the reference, the best uniform merge: it keeps 35.0%")


def test_nothing_to_compare_with_gives_no_outcome():
    assert judge("ours", "", standings(Estimate(0.5), None)).outcome is None
    assert judge("ours", "plain", standings(Estimate(None), None)).outcome is None
    found = judge("ours", "plain", standings(Estimate(0.5), Estimate(0.15)))
    assert found.outcome is None and "95%" not in found.sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Estimate(0.11, 0.09, 0.13), ", worse."),
        (Estimate(-0.11, -0.13, -0.09), ", better."),
        (Estimate(0.01, -0.02, 0.04), ", no difference seen."),
        (Estimate(0.01), "+0.010 nats per token."),
    ],
)
def test_forgetting(change, words):
    (said,) = judge("ours", "", standings(Estimate(0.5), None, forgetting=change)).details
    assert said.endswith(words)


def test_a_winner_without_numbers_is_a_mistake():
    with pytest.raises(ValueError, match="no standing"):
        judge("ghost", "plain", standings(Estimate(0.5), None))
