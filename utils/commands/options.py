"""What command 2 was asked to do."""

from dataclasses import dataclass
from pathlib import Path

from utils.guidance.recipe_choices import RecipeOptions
from utils.pair.config import PairConfig


@dataclass(frozen=True)
class DecideOptions:
    """What command 2 was asked to do; `recipe` is what was asked of the recipe itself, `said` a line that says what was chosen for the
    user."""

    config: PairConfig
    recipe: RecipeOptions
    delta_dfs_in_dir: Path
    out_dir: Path
    control: str | None = None
    portable: bool = False
    plot: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    accept_edited: bool = False
    quiet: bool = False
    said: str = ""
