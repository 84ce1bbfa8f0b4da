"""What stands in the tables of scores: order, words of a comparison, and intervals laid around the reference."""

import math

import pytest

from tests.reports.document import read
from utils.reports.score_tables import forgetting_table, standings_table, task_table
from utils.reports.tables import around_reference, outcome_of
from utils.reports.values import Contender, Estimate, Outcome, Page, Role, Score, Standing, TaskScores


def page(**more) -> Page:
    contenders = (
        Contender("second", Role.CANDIDATE),
        Contender("first", Role.CANDIDATE),
        Contender("plain", Role.CONTROL),
        Contender("math", Role.EXPERT),
        Contender("base", Role.BASE),
    )
    return Page("x", contenders=contenders, reference="plain", winner="first", **more)


LOSSES = TaskScores(
    "math",
    "loss, nats per token",
    False,
    (
        Score("base", Estimate(2.0), Estimate(0.2, 0.1, 0.3), 0.001, 0.0, math.exp(2.0)),
        Score("math", Estimate(1.5), None, None, 1.0, math.exp(1.5)),
        Score("plain", Estimate(1.8), None, None, 0.4),
        Score("first", Estimate(1.7), Estimate(-0.1, -0.15, -0.05), 0.01, 0.6),
        Score("second", Estimate(1.81), Estimate(0.01, -0.1, 0.12), 0.9, 0.38),
    ),
    rows=100,
)


def test_rows_go_by_role_and_the_winner_leads_its_like():
    table = task_table(page(tasks=(LOSSES,)), LOSSES)
    assert [row.name for row in table.rows] == ["base", "math", "plain", "first", "second"]
    assert [row.name for row in table.rows if row.winner] == ["first"]
    assert [row.name for row in table.rows if row.reference] == ["plain"]


def test_cells_say_value_gain_and_difference():
    table = task_table(page(tasks=(LOSSES,)), LOSSES)
    assert [column.label for column in table.columns] == [
        "\N{LEFTWARDS ARROW} better",
        "loss",
        "gain kept",
        "against plain",
    ]
    base, _, plain, first, second = ([read(cell).text for cell in row.cells[1:]] for row in table.rows)
    assert base[0] == "2.000 perplexity 7.39" and base[1] == "0.0%" and "worse" in base[2]
    assert plain == ["1.800", "40.0%", ""]
    assert (
        first[2].startswith("\N{MINUS SIGN}0.100 better") and "\N{MINUS SIGN}0.150 to \N{MINUS SIGN}0.050" in first[2]
    )
    assert "no difference seen" in second[2]


def test_a_line_reaches_the_reference_exactly_where_nothing_is_distinguished():
    table = task_table(page(tasks=(LOSSES,)), LOSSES)
    for row in table.rows:
        strip = read(row.cells[0])
        lines = strip.all("line", "interval")
        if not lines:
            continue
        (reference,) = strip.all("line", "reference")
        left, right = (float(lines[0].attributes[name].rstrip("%")) for name in ("x1", "x2"))
        crosses = left <= float(reference.attributes["x1"].rstrip("%")) <= right
        assert crosses == ("no difference" in row.cells[-1])


@pytest.mark.parametrize(
    ("difference", "p", "higher", "outcome"),
    [
        (Estimate(0.1, 0.05, 0.15), None, True, Outcome.BETTER),
        (Estimate(0.1, 0.05, 0.15), None, False, Outcome.WORSE),
        (Estimate(-0.1, -0.15, -0.05), 0.04, False, Outcome.BETTER),
        (Estimate(-0.1, -0.15, 0.05), 0.04, False, Outcome.UNCLEAR),
        (Estimate(0.1, 0.05, 0.15), 0.051, True, Outcome.UNCLEAR),
        (Estimate(0.1), 0.01, True, None),
        (None, 0.01, True, None),
    ],
)
def test_outcomes(difference, p, higher, outcome):
    assert outcome_of(difference, p, higher) is outcome


def test_without_a_reference_the_own_interval_is_drawn():
    own = Estimate(0.7, 0.6, 0.8)
    assert around_reference(own, None, None) == own
    assert around_reference(own, None, Estimate(0.5)) == Estimate(0.7)
    assert around_reference(own, Estimate(0.2, 0.1, 0.3), Estimate(0.5)) == Estimate(0.7, 0.6, 0.8)


def test_many_candidates_are_folded_away():
    contenders = (Contender("base", Role.BASE), *(Contender(f"c{index}", Role.CANDIDATE) for index in range(40)))
    scores = tuple(Score(one.name, Estimate(index)) for index, one in enumerate(contenders))
    task = TaskScores("t", "loss", False, scores)
    table = task_table(Page("x", contenders=contenders, tasks=(task,)), task)
    assert (len(table.rows), len(table.folded)) == (13, 28)


def test_standings_and_forgetting():
    standings = (
        Standing("base", Estimate(0.0), forgetting=Estimate(0.0)),
        Standing("plain", Estimate(0.4), worst=0.3, worst_task="code"),
        Standing("first", Estimate(0.6), Estimate(0.2, 0.1, 0.3), None, 0.5, "math", Estimate(0.05, 0.04, 0.06)),
    )
    table = standings_table(page(standings=standings))
    words = {row.name: [read(cell).text for cell in row.cells] for row in table.rows}
    assert words["first"][1:] == ["60.0%", "50.0% math", "+20.0 points better +10.0 to +30.0"]
    assert words["base"][3] == ""
    forgotten = forgetting_table(page(standings=standings))
    assert [row.name for row in forgotten.rows] == ["base", "first"]
    assert "worse" in forgotten.rows[1].cells[1] and "better" not in forgotten.rows[0].cells[1]
    assert forgetting_table(page(standings=standings[1:2])) is None
