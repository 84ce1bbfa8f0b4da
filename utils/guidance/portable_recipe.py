"""A recipe that stock mergekit runs, beside a guided one that it does not: as much of the guidance as it can express.

Stock mergekit has one number for each tensor that it plans, and stacks a mixture's experts. So what the guided recipe gives
to several of its tensors becomes their mean over parameters; and in place of a merge method of this project's stands
mergekit's that does the same without vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from utils.errors import UserError
from utils.guidance.guided_recipe import GuidedRecipe, recipe_file_name, weight_filters, without_vectors
from utils.guidance.measured_pair import MeasuredPair
from utils.recipes.filters import exact_filters
from utils.recipes.naming import Naming
from utils.recipes.recipe import recipe
from utils.recipes.recipe_manifest import PORTABLE
from utils.recipes.routers import in_stock_mergekit
from utils.recipes.stock import StockNames, stock_names

_WHERE = "stock mergekit"


@dataclass(frozen=True)
class Portable:
    """The recipe: file name, content, a clause that says what is in it, whether command 3 needs --fused_experts for stock
    mergekit's names, and whether its method keeps a share of each change, which magnitudes that are equal leave open."""

    name: str
    data: Mapping[str, Any]
    said: str
    fused: bool
    keeps: bool
    kind: str = PORTABLE


def portable_recipe(measured: MeasuredPair, made: GuidedRecipe) -> Portable:
    """The recipe for stock mergekit that is nearest to a guided one.

    Raises:
        UserError: the guided recipe runs in stock mergekit itself; stock mergekit cannot merge these models; sizes of
            tensors are not known.
    """
    if not made.only_here:
        raise UserError(
            f"--portable has no effect: {made.name} itself runs in mergekit-yaml; leave it out", "flag-no-effect"
        )
    stock, settings, naming = stock_names(measured.models), made.settings, made.decision.naming
    plain = without_vectors(measured, made)
    table = _averaged(made.decision.table, naming, stock)
    if plain.method is not settings.method and settings.method.whole:  # a mean of changes is a sum of shares of them
        shares = {one.type: settings.expert_weights.get(one.type, 1.0) for one in settings.experts}
        shares = {key: value / sum(shares.values()) for key, value in shares.items()}
        plain = replace(plain, expert_weights=shares, as_weights=settings.as_factors)
        if settings.as_factors:
            table = table.assign(weight=table["weight"] * table["model"].map(shares))
    routers = in_stock_mergekit(plain.routers, stock)
    plain = replace(plain, routers=routers)
    tied = {other: stock.by_own[name] for other, name in naming.tied.items() if other in stock.tensors}
    tied |= _biases_of_stacks(table, stock)
    dense = list(dict.fromkeys(stock.by_own[name] for name in naming.filters))
    proof, before = exact_filters(dense, stock.tensors, _WHERE)
    try:
        weighed = weight_filters(table, routers, stock.tensors, _WHERE, tied) if plain.as_weights else None
    except UserError as error:  # a stack's name is the beginning of its biases' name
        raise UserError(
            f"--portable: filters of stock mergekit cannot express these weights: {error}; merge with utils/merger.py, "
            "without --portable",
            "recipe-not-portable",
        ) from error
    found = Naming(
        names={},
        filters=proof,
        params={},
        coverage=None,
        evidence="",
        group_filters=weighed,
        tied=tied,
        before=before,
    )
    fused = any(name != other for name, other in stock.by_own.items())
    stacked = len(set(stock.by_own.values())) < len(stock.by_own)
    said = f"{len(set(stock.by_own.values()))} tensors as stock mergekit has them" + (
        f", each with the mean of its experts' numbers ({len(stock.by_own)} in the guided recipe)" if stacked else ""
    )
    if plain.method is not settings.method:
        said += f"; {plain.method.name} in place of {settings.method.name}"
    name = recipe_file_name(measured.config, made.choices, made.decision, PORTABLE)
    return Portable(name, recipe(table, found, plain), said, fused, bool(plain.method.keeps))


def _biases_of_stacks(table: pd.DataFrame, stock: StockNames) -> dict[str, str]:
    """Biases whose names begin with a stack's, so that every filter of it hits them: they take its numbers; by their names."""
    matrices = dict.fromkeys(table["tensor"])
    pairs = {f"{name}_bias": name for name in matrices}
    return {bias: name for bias, name in pairs.items() if bias in stock.tensors and bias not in matrices}


def _averaged(table: pd.DataFrame, naming: Naming, stock: StockNames) -> pd.DataFrame:
    """The coefficients of stock's tensors: means over the parameters of ours."""
    if not (table["params"] > 0).all():
        raise UserError(
            "--portable needs the sizes of the tensors; measure with lewis_importance.py", "tensor-sizes-unknown"
        )
    dense = table["tensor"].isin(naming.filters)
    rows = []
    planned = table.assign(tensor=table["tensor"].map(stock.by_own), dense=dense)
    for (model, tensor), own in planned.groupby(["model", "tensor"], sort=False):
        params = own["params"].to_numpy(dtype="float64")
        counted = np.where(own["dense"], params, 0.0) if own["dense"].any() else params
        density = float(np.average(own["density"], weights=counted))
        weight = float(np.average(own["weight"], weights=params))
        first = own.iloc[0]
        rows.append((model, tensor, first["layer"], first["component"], density, weight, int(params.sum())))
    return pd.DataFrame(rows, columns=[*table.columns[:-1], "params"])
