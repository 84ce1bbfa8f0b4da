"""What the *decide* half of a guidance method works on, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.pair.config import ModelEntry, PairConfig
from utils.recipes.method_rules import DeltaMethod
from utils.recipes.naming import LocalModels, Naming

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DecideJob:
    """Everything a *decide* half needs.

    `experts` are those to merge, in their order in the recipe. `folder` is the dataframe folder, `manifest` what it says
    (None: a folder of bare CSVs). `models` are those on this machine, and what the merge will write. `merge_method` is the
    one that the recipe names. `options` are the values of the method's own flags. `mean_density` is the share of the
    measured parameters to keep, None where the user gave none.
    """

    config: PairConfig
    experts: tuple[ModelEntry, ...]
    folder: Path
    manifest: Mapping[str, Any] | None
    models: LocalModels
    merge_method: DeltaMethod
    options: Mapping[str, Any]
    mean_density: float | None


@dataclass(frozen=True)
class Decision:
    """What a *decide* half decided.

    Attributes:
        table: densities and weights (`utils/recipes/coefficients.py`).
        naming: the names and filters of the table's tensors.
        writes_weights: whether the table's weights belong into the recipe; otherwise all are 1.
        how: (label, sentence) pairs that say how the numbers came about.
        after: lines about the result.
        remarks: makes more of them, for whoever reads them: what takes a while to work out.
        warnings: sentences.
        numbers: gamma and epsilon, where the recipe's file name begins with them.
        tags: what the recipe's file name says of the other options, before the guidance's name.
        tags_beside: more of that, left out where there is nothing else to say (the released code's names lack it).
        lambda_: the factor on the merged delta if neither a flag nor the pair config gives one; None: mergekit's.
        writes_factors: whether the table's weights belong into the recipe as `factor`, of this project's merge methods.
        vectors: by expert type, the content of the file of saliency vectors that the merge method reads.
        measured: by expert type, the name of a file in the dataframe folder that it reads instead, too large to be copied;
            or the absolute path of one elsewhere.
        expert_weights: by expert type, its weight in all tensors, where they differ.
        parameters: shared parameters of the merge method that the measurement decides where the pair config does not.
        router: what was measured for, as `--router` says it; None: anything.
        fits_adapter: whether `utils/merger.py --adapter` can write the merge.
        fixed: shared parameters that hold whatever the pair config says.
        pictures: makes more pictures for `--plot`: PNGs by the end of their file names.
        scale: the ends of the color scale of the heatmaps, None for those of the table.
    """

    table: "pd.DataFrame"
    naming: Naming
    writes_weights: bool
    how: tuple[tuple[str, str], ...]
    after: tuple[str, ...] = ()
    remarks: Callable[[], Sequence[str]] = tuple
    warnings: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    tags: tuple[str, ...] = ()
    tags_beside: tuple[str, ...] = ()
    lambda_: float | None = None
    writes_factors: bool = False
    vectors: Mapping[str, bytes] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)
    expert_weights: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    router: str | None = None
    fits_adapter: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pictures: Callable[[], Mapping[str, bytes]] = dict
    scale: tuple[float, float] | None = None
