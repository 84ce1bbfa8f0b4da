"""What a careful user tries by hand, tried before the search chooses anything: its winner is never worse on these rows."""

from dataclasses import dataclass

from utils.recipes.method_rules import TASK_ARITHMETIC
from utils.searching.recipes import RecipeMaker
from utils.searching.space import DENSITY, LAMBDA, LINES, UNIFORM, Point, Space

_LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_LINES_LAMBDAS = (0.3, 0.5)
_TIES = ((0.2, 1.0), (0.5, 0.5), (0.5, 1.0))  # density, lambda; what the papers and mergekit's examples take


@dataclass(frozen=True)
class Known:
    """A recipe to try first: its point, and what to call it."""

    name: str
    point: Point


def knowns(space: Space, maker: RecipeMaker, *, unguided_only: bool = False) -> list[Known]:
    """Uniform task arithmetic at several lambdas (1 / experts among them), uniform TIES, LiNeS, each guided way of the
    space at its defaults. The uniform ones are tried whatever the space holds: they are what a winner is compared with."""
    experts = max(1, len(space.experts))
    found = [
        Known(f"uniform task arithmetic, lambda {value:g}", Point(TASK_ARITHMETIC.name, UNIFORM, {LAMBDA: value}))
        for value in sorted({*_LAMBDAS, round(1 / experts, 3)})
    ]
    found += [
        Known(
            f"uniform TIES, density {density:g}, lambda {scale:g}",
            Point("ties", UNIFORM, {LAMBDA: scale, DENSITY: density}),
        )
        for density, scale in _TIES
    ]
    if unguided_only:
        return found
    if space.blocks > 1:
        found += [
            Known(f"LiNeS, lambda {value:g}", Point(TASK_ARITHMETIC.name, LINES, {LAMBDA: value}))
            for value in _LINES_LAMBDAS
        ]
    return found + [Known(f"{way.label} at its defaults", maker.default(way)) for way in space.ways if way.guided]
