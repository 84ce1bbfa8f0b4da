"""What command 2 was asked to do, and what it decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.guidance.decide_job import Decision
from utils.guidance.method import GuidanceMethod
from utils.pair.config import ModelEntry, PairConfig

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DecideOptions:
    """What command 2 was asked to do. `method_options` are the values of the guidance method's own flags."""

    config: PairConfig
    method: GuidanceMethod
    method_options: Mapping[str, Any]
    delta_dfs_in_dir: Path
    out_dir: Path
    merge_method: str
    mean_density: float | None = None
    control: str | None = None
    lambda_: float | None = None
    out_dtype: str | None = None
    plot: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The experts to merge, in the order of `target_model_names`."""
        by_type = {entry.type: entry for entry in self.config.experts}
        return tuple(by_type[name] for name in self.config.target_model_names)


@dataclass(frozen=True)
class Result:
    """What was decided, and the files it makes: recipes by name (the guided one first), vectors and pictures."""

    decision: Decision
    control: "pd.DataFrame | None"
    recipes: tuple[str, ...]
    files: Mapping[str, bytes] = field(repr=False)
