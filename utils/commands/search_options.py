"""What the searcher was asked to do, and the files it writes."""

from dataclasses import dataclass

from utils.commands.ray_flags import RayFlags
from utils.commands.scorers import ScoringOptions
from utils.publishing.manifest import MANIFEST
from utils.recipes.recipe_manifest import manifest_name

COMMAND = "utils/searcher.py"
TRIALS, SCORES, REPORT = "trials.csv", "scores.csv", "report.html"
BEST, BEST_STOCK, BEST_UNIFORM = "best.yaml", "best_stock.yaml", "best_uniform.yaml"
_RECIPES = (BEST, BEST_STOCK, BEST_UNIFORM)
FILES = (*_RECIPES, *map(manifest_name, _RECIPES), TRIALS, SCORES, REPORT, MANIFEST)
LOSSES = "losses"  # the folder of what was scored


@dataclass(frozen=True)
class SearchOptions(ScoringOptions):
    """What the search was asked to do.

    `trials` in all, `batch` of them asked for and raced together, `first_rows` of each task in a race's first round.
    `margin` is how much better a recipe has to be than the leader to stay in it, in points of gain kept. `max_disk` is in
    bytes, of the output folder; `max_hours` of this run.
    """

    trials: int = 64
    batch: int = 8
    sampler: str = "auto"
    objective: str = "mean"
    pareto: bool = False
    seed: int = 0
    measure: bool = False
    first_rows: int = 6
    margin: float = 0.5
    max_hours: float | None = None
    max_disk: int | None = None
    ray: RayFlags | None = None

    @property
    def figure(self) -> str:
        """What is made as large as can be, in words."""
        return {"mean": "mean gain kept", "worst": "least gain kept", "weighted": "weighted gain kept"}[self.objective]
