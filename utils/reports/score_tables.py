"""The two tables that hold the answer: one task, and all tasks together."""

from markupsafe import Markup

from utils.reports.dots import axis, dot_strip
from utils.reports.formats import decimals_for, decimals_within, number, percent
from utils.reports.scale import scale_for
from utils.reports.tables import (
    Cell,
    Column,
    Table,
    all_numbers,
    around_reference,
    contender_table,
    difference_cell,
    matters,
    scaled,
    two_lines,
)
from utils.reports.values import Estimate, Page, Role, TaskScores, is_known


def task_table(page: Page, task: TaskScores) -> Table:
    """One task: value, share of the gain kept and paired difference of each contender, with dots and lines."""
    scores = {score.contender: score for score in task.scores}
    roles = {each.name: each.role for each in page.contenders}
    reference = scores[page.reference].value if page.reference in scores else None
    drawn = {name: around_reference(one.value, one.difference, reference) for name, one in scores.items()}
    keep = [drawn[each.name].value for each in page.contenders if each.name in scores and matters(page, each)]
    scale = scale_for(all_numbers(drawn.values()), keep)
    base = next(
        (scores[name].value.value for name, role in roles.items() if role is Role.BASE and name in scores), None
    )
    guides = {"base-line": base, "reference": reference.value if reference else None}
    factor, unit = (100.0, " points") if task.percent else (1.0, "")
    decimals = decimals_within(
        (scaled(one.difference or one.value, factor) for one in task.scores),
        otherwise=decimals_for([factor * value for value in keep if is_known(value)]),
    )

    def value(name: str) -> Markup:
        one = scores[name]
        shown = percent(one.value.value, decimals) if task.percent else number(one.value.value, decimals)
        below = f"perplexity {number(one.perplexity, 2)}" if is_known(one.perplexity) else ""
        return two_lines(shown, below)

    def difference(name: str) -> Markup:
        one = scores[name]
        return difference_cell(one.difference, one.p, task.higher_is_better, decimals, factor, unit)

    columns: list[tuple[Column, Cell]] = [
        (
            Column("better →" if task.higher_is_better else "← better", "strip", axis(scale, task.percent)),
            lambda name: dot_strip(scale, drawn[name], roles[name], guides),
        ),
        (Column(task.measure.partition(",")[0]), value),
    ]
    if any(is_known(one.gain) for one in task.scores):
        columns.append((Column("gain kept"), lambda name: percent(scores[name].gain)))
    if any(one.difference for one in task.scores):
        columns.append((Column(_against(page), "difference"), difference))
    return contender_table(page, f"{task.name}: {task.measure}", columns, scores)


def standings_table(page: Page) -> Table:
    """All tasks together: mean share of the gain kept and the worst task."""
    standings = {one.contender: one for one in page.standings}
    roles = {each.name: each.role for each in page.contenders}
    reference = standings[page.reference].gain if page.reference in standings else None
    drawn = {name: around_reference(one.gain, one.difference, reference) for name, one in standings.items()}
    keep = [drawn[each.name].value for each in page.contenders if each.name in standings and matters(page, each)]
    worst = [one.worst for one in page.standings]
    scale = scale_for([0.0, *all_numbers(drawn.values()), *worst], [0.0, *keep])
    guides = {"base-line": 0.0, "reference": reference.value if reference else None}

    def strip(name: str) -> Markup:
        return dot_strip(scale, drawn[name], roles[name], guides, standings[name].worst)

    def worst_task(name: str) -> Markup:
        return two_lines(percent(standings[name].worst), standings[name].worst_task)

    def difference(name: str) -> Markup:
        one = standings[name]
        return difference_cell(one.difference, one.p, True, 1, 100.0, " points")

    columns: list[tuple[Column, Cell]] = [
        (Column("better →", "strip", axis(scale, percent=True)), strip),
        (Column("mean gain kept"), lambda name: percent(standings[name].gain.value)),
    ]
    if any(map(is_known, worst)):
        columns.append((Column("worst task"), worst_task))
    if any(one.difference for one in page.standings):
        columns.append((Column(_against(page), "difference"), difference))
    return contender_table(page, "Share of the experts' gain over the base that is kept", columns, standings)


def forgetting_table(page: Page) -> Table | None:
    """Loss on general text against the base's, or None where none was measured."""
    losses = {one.contender: one.forgetting for one in page.standings if one.forgetting and one.forgetting.known}
    if not losses:
        return None
    roles = {each.name: each.role for each in page.contenders}
    keep = [losses[each.name].value for each in page.contenders if each.name in losses and matters(page, each)]
    scale = scale_for([0.0, *all_numbers(losses.values())], [0.0, *keep])
    decimals = decimals_within(losses.values(), otherwise=decimals_for([0.0, *keep]))

    def change(name: str) -> Markup:
        return difference_cell(_no_base(losses[name], roles[name]), None, False, decimals, 1.0, "")

    columns: list[tuple[Column, Cell]] = [
        (
            Column("← better", "strip", axis(scale)),
            lambda name: dot_strip(scale, losses[name], roles[name], {"base-line": 0.0}),
        ),
        (Column("loss above the base", "difference"), change),
    ]
    return contender_table(page, "Forgetting: loss on general text less the base's, nats per token", columns, losses)


def _no_base(change: Estimate, role: Role) -> Estimate:
    """The base against itself is zero by definition, which is no finding."""
    return Estimate(change.value) if role is Role.BASE else change


def _against(page: Page) -> str:
    return f"against {page.reference}" if page.reference else "difference"
