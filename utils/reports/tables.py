"""What the template needs to write a table: columns, rows of names, pictures and numbers."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from markupsafe import Markup

from utils.reports.formats import interval, number, p_value
from utils.reports.values import Contender, Estimate, Outcome, Page, Role, is_known

MOST_OPEN = 12  # candidates that are listed at once; the others are folded away
MOST_ROWS = 300  # what a table holds; the files beside the page hold everything
LEVEL = 0.05


@dataclass(frozen=True)
class Column:
    """A column: its heading, "number", "text", "strip" or "difference", and the axis above its strips."""

    label: str
    kind: str = "number"
    axis: Markup | None = None


@dataclass(frozen=True)
class Row:
    """A row: its name, and one cell per column; `contender` is None where rows are no contenders."""

    name: str
    cells: tuple[str, ...]
    contender: Contender | None = None
    winner: bool = False
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `folded` rows are shown on demand, `left_out` more are not on the page."""

    caption: str
    name_label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    folded: tuple[Row, ...] = ()
    left_out: int = 0


Cell = Callable[[str], str]  # a contender's name -> what stands in its row


def contender_table(page: Page, caption: str, columns: Iterable[tuple[Column, Cell]], scored: Container[str]) -> Table:
    """A table with one row per contender that is in `scored`: all that is no candidate, and the first candidates.

    The rows are ordered by role and, within it, as the page has them, the winner first.
    """
    columns = list(columns)
    order = list(Role)
    contenders = sorted(
        (each for each in page.contenders if each.name in scored),
        key=lambda each: (order.index(each.role), each.name != page.winner),
    )
    rows = [
        Row(
            each.name,
            tuple(cell(each.name) for _, cell in columns),
            each,
            winner=each.name == page.winner,
            reference=each.name == page.reference,
        )
        for each in contenders[:MOST_ROWS]
    ]
    opened = sum(each.role is not Role.CANDIDATE for each in contenders) + MOST_OPEN
    return Table(
        caption,
        "model or recipe",
        tuple(column for column, _ in columns),
        tuple(rows[:opened]),
        tuple(rows[opened:]),
        max(0, len(contenders) - MOST_ROWS),
    )


def outcome_of(difference: Estimate | None, p: float | None, higher_is_better: bool) -> Outcome | None:
    """What a paired difference says: told apart if its interval leaves zero out and a corrected p, if any, agrees."""
    if difference is None or not (difference.known and difference.bounded):
        return None
    apart = (difference.low > 0 or difference.high < 0) and not (is_known(p) and p >= LEVEL)
    if not apart:
        return Outcome.UNCLEAR
    return Outcome.BETTER if (difference.value > 0) == higher_is_better else Outcome.WORSE


def difference_cell(
    difference: Estimate | None, p: float | None, higher_is_better: bool, decimals: int, scale: float, unit: str
) -> Markup:
    """A difference in words and numbers: the value, what it says, and on a second line its interval and p."""
    if difference is None or not difference.known:
        return Markup()
    outcome = outcome_of(difference, p, higher_is_better)
    value = number(scale * difference.value, decimals, signed=True) + unit
    within = ", ".join(filter(None, [interval(difference, decimals, scale=scale, signed=True), p_value(p)]))
    said = Markup('<span class="outcome {}">{}</span>').format(outcome.name.lower(), outcome) if outcome else Markup()
    return two_lines(Markup("{} {}").format(value, said), within)


def two_lines(figure: str, below: str) -> Markup:
    """A number and, smaller, what belongs to it."""
    second = Markup(' <span class="within">{}</span>').format(below) if below else Markup()
    return Markup('<span class="figure">{}</span>{}').format(figure, second)


def around_reference(value: Estimate, difference: Estimate | None, reference: Estimate | None) -> Estimate:
    """What is drawn of a value: its place, and the interval of its paired difference laid around the reference.

    An interval that does not reach the reference's line is then a difference that is told apart. Where there is no
    reference, the value's own interval is drawn.
    """
    if reference is None:
        return value
    if difference is None or not difference.bounded or not reference.known:
        return Estimate(value.value)
    return Estimate(value.value, reference.value + difference.low, reference.value + difference.high)


def all_numbers(estimates: Iterable[Estimate]) -> list[float | None]:
    """Values and ends of intervals, for a scale that holds them."""
    return [number for each in estimates for number in (each.value, each.low, each.high)]


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same estimate in another unit."""
    numbers = (estimate.value, estimate.low, estimate.high)
    return Estimate(*(None if number is None else factor * number for number in numbers))


def matters(page: Page, contender: Contender) -> bool:
    """Whether a contender must be told apart well in a picture: all but the candidates that did not win."""
    return contender.role is not Role.CANDIDATE or contender.name == page.winner
