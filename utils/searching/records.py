"""What stands beside a recipe that a search found: the same manifest as beside one of command 2, and which trial it was."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.recipe_files import measurement_record
from utils.pair.config import PairConfig
from utils.recipes.recipe_manifest import RecipeManifest
from utils.recipes.saliency_vectors import open_vectors
from utils.searching.points import DENSITY, LAMBDA
from utils.searching.study import Finished


def recipe_record(
    config: PairConfig,
    measured: MeasuredPair | None,
    one: Finished,
    written: tuple[str, bytes],
    data: Mapping[str, Any],
    vectors: Mapping[str, Path],
    search: Mapping[str, Any],
    fused_experts: bool = False,
) -> RecipeManifest:
    """The manifest of a winner's recipe.

    Args:
        config: the pair config.
        measured: what guided it, None for an unguided recipe.
        one: the trial.
        written: name and content of the recipe file.
        data: the recipe.
        vectors: the files of vectors, by the names that it has for them.
        search: what else is known of the search.
        fused_experts: whether its filters are for stacked experts.
    """
    point, (name, content) = one.point, written
    numbers = {key: value for key, value in point.numbers.items() if key not in (LAMBDA, DENSITY)}
    factors = {"factors": dict(point.weights), "depth_factors": list(point.depth)}
    return RecipeManifest(
        recipe={"name": name, "sha256": hashlib.sha256(content).hexdigest()},
        vectors={file: open_vectors(path).content_hash() for file, path in vectors.items()},
        guidance=point.guidance,
        guidance_options={**numbers, **point.options},
        control=None,
        merge_method=data["merge_method"],
        mean_density=point.numbers.get(DENSITY),
        lambda_=data["parameters"].get("lambda"),
        dtype=data["dtype"],
        out_dtype=data.get("out_dtype"),
        **measurement_record(config, measured),
        fused_experts=fused_experts,
        search={"trial": one.number, **search, **factors},
    )
