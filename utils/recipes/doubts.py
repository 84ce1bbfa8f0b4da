"""What a recipe that is sound may yet do wrong, as sentences: weights without effect, too much added, changes rounded away."""

from collections.abc import Iterable

import pandas as pd

from utils.models.checkpoints import Checkpoint
from utils.recipes.coefficients import average
from utils.recipes.global_parameters import normalizes
from utils.recipes.recipe import RecipeSettings

_ADDED = 1.2  # sum over experts of lambda x mean weight; what averages or solves for its weights stays near or below 1
_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}  # of a number's digits, by the dtype
_HELD = "with two experts, validation text chose a lambda of 0.2 to 0.4 (benchmarks/results/quality.csv); see --lambda"


def doubts(settings: RecipeSettings, table: pd.DataFrame, checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Sentences about a recipe.

    Args:
        settings: what the recipe says beside the coefficients.
        table: the coefficients.
        checkpoints: those of its models that lie on this machine.
    """
    found = [
        cancelled_weights(settings, "weights"),
        _added_up(settings, table),
        _rounded_away(settings, checkpoints),
        _wider_file(settings),
    ]
    return [text for text in found if text]


def cancelled_weights(settings: RecipeSettings, what: str) -> str:
    """A sentence if weights have no effect: one expert, and the merge divides by the sum of the weights; else ""."""
    divides = normalizes(settings.method, settings.parameters)
    if not (settings.as_weights and len(settings.experts) == 1 and divides):
        return ""
    return (
        f"{what} have no effect here: with one expert and normalize: true the merge divides each delta by the very "
        "weight it was multiplied with; set normalize: false in global_parameters"
    )


def _added_up(settings: RecipeSettings, table: pd.DataFrame) -> str:
    """Several experts' changes in full: their sum leads away from all of them."""
    method, count = settings.method, len(settings.experts)
    lambda_ = settings.lambda_ if settings.lambda_ is not None else settings.parameters.get("lambda", 1)
    if count == 1 or method.averages or not isinstance(lambda_, (int, float)):
        return ""
    if normalizes(method, settings.parameters):
        if not method.votes or lambda_ < _ADDED / 2:
            return ""
        return (
            f"{method.name} divides only where experts change an entry in the same direction; what one of the {count} "
            f"changes alone is added whole, at lambda {lambda_:g}: {_HELD}"
        )
    weights = [settings.weight] * count
    if settings.as_weights:
        weights = [average(part, "weight") for _, part in table.groupby("model", sort=False)]
    total = lambda_ * sum(weights)
    if total <= _ADDED:
        return ""
    return (
        f"the changes of {count} experts are added up at lambda {lambda_:g} and not divided, {total:.3g} times as much as "
        f"one: {_HELD}"
    )


def _wider_file(settings: RecipeSettings) -> str:
    """Numbers of one precision, written in a wider one."""
    if settings.out_dtype is None or _BITS[settings.out_dtype] <= _BITS[settings.dtype]:
        return ""
    return (
        f"the merged model is written in {settings.out_dtype}, but every merged entry is a {settings.dtype} number, in "
        f"which the merge computes: a larger file that is no more precise; --dtype {settings.out_dtype} merges in it"
    )


def _rounded_away(settings: RecipeSettings, checkpoints: Iterable[Checkpoint]) -> str:
    """Inputs in float32, merged in less."""
    finer = [
        one.name for one in checkpoints if settings.dtype != "float32" and one.float_dtype in ("float32", "float64")
    ]
    if not finer:
        return ""
    part = {"bfloat16": "0.2 %", "float16": "0.02 %"}[settings.dtype]  # half the spacing of numbers, 2^-9 and 2^-12
    return (
        f"{', '.join(finer)}: stored in float32, merged in {settings.dtype}, which loses changes of less than about {part} "
        "of a weight; --dtype float32 keeps them"
    )
