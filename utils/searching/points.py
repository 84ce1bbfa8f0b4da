"""Ways to merge, and points: a way with all its numbers set.

A *way* is a merge method with what guides it: a guidance method that has measured the pair, `uniform` (the same for all
tensors) or `lines` (LiNeS: weights that grow with depth). A *point* says all that `utils/searching/recipes.py` needs to
make the recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNIFORM, LINES = "uniform", "lines"
UNGUIDED = (UNIFORM, LINES)
LAMBDA, DENSITY = "lambda", "density"


@dataclass(frozen=True)
class Way:
    """A merge method and what guides it. `numbers` are what it has to set, by name; `choices` its guidance's options."""

    merge_method: str
    guidance: str
    numbers: tuple[str, ...]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the way is called in a study."""
        return f"{self.merge_method}, {self.guidance}"

    @property
    def label(self) -> str:
        """What the way is called wherever people look."""
        return way_label(self.merge_method, self.guidance)

    @property
    def guided(self) -> bool:
        """Whether a measurement guides it."""
        return self.guidance not in UNGUIDED


@dataclass(frozen=True)
class Point:
    """A way with its numbers set.

    `numbers` are by name (None: what the guidance itself would take), `options` the guidance's own flags by name,
    `weights` each expert's factor by type (empty: 1 for all), `depth` that of each group of neighboring blocks (empty: 1).
    """

    merge_method: str
    guidance: str
    numbers: Mapping[str, float | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    depth: tuple[float, ...] = ()

    @property
    def uniform(self) -> bool:
        """Whether it merges all tensors of all experts alike: what a careful user writes by hand."""
        return self.guidance == UNIFORM and not self.weights and not self.depth

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "merge_method": self.merge_method,
            "guidance": self.guidance,
            "numbers": dict(self.numbers),
            "options": dict(self.options),
            "weights": dict(self.weights),
            "depth": list(self.depth),
        }

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "Point":
        """The point of plain data."""
        return cls(**{**data, "depth": tuple(data["depth"])})

    def sentence(self) -> str:
        """What it is, in one line."""
        numbers = [f"{name} {value:.4g}" for name, value in self.numbers.items() if value is not None]
        options = [f"{name} {value}" for name, value in self.options.items()]
        weights = [f"{expert} x{value:.3g}" for expert, value in self.weights.items()]
        depth = [f"depth {' '.join(f'x{value:.3g}' for value in self.depth)}"] if self.depth else []
        return "; ".join([way_label(self.merge_method, self.guidance), *numbers, *options, *weights, *depth])


def way_label(merge_method: str, guidance: str) -> str:
    """What people are told: a guidance's own merge method goes by that one name."""
    return guidance if merge_method == guidance else f"{merge_method}, {guidance}"
