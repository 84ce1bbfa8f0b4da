"""What any careful user would try by hand: uniform task arithmetic and uniform TIES, at several settings.

Which setting stands for each kind is chosen on validation rows, so that a candidate is compared with uniform merges at
their best (LiNeS and others are the search's).
"""

from typing import Any

from utils.evaluation.candidates import Candidate
from utils.pair.config import PairConfig
from utils.recipes.recipe import model_key
from utils.recipes.routers import RouterChoice

# the most telling first: a search, whose yardstick these are, too, may try only some
SCALES = (0.35, 0.2, 0.5, 1.0, 0.7)  # lambda of task arithmetic
TIES_SETTINGS = ((0.5, 1.0), (0.2, 1.0), (0.5, 0.35), (0.2, 0.35))  # density, lambda
TASK_ARITHMETIC, TIES = "task arithmetic", "TIES"
_ALIKE = RouterChoice()  # routers are merged like everything else, or there are none


def uniform_controls(config: PairConfig, out_dtype: str, routers: RouterChoice = _ALIKE) -> dict[str, list[Candidate]]:
    """The uniform merges of a pair's experts to merge at every setting, by kind.

    Args:
        config: the pair.
        out_dtype: torch name of the dtype that they are rounded to, the base's own.
        routers: what they do with a mixture's routers: what guided recipes do, so that guidance alone tells them apart.
    """
    arithmetic = [
        _control(f"{TASK_ARITHMETIC} {scale:g}", uniform_task_arithmetic(config, scale, out_dtype, routers))
        for scale in SCALES
    ]
    ties = [
        _control(f"{TIES} density {density:g}, {scale:g}", uniform_ties(config, density, scale, out_dtype, routers))
        for density, scale in TIES_SETTINGS
    ]
    return {TASK_ARITHMETIC: arithmetic, TIES: ties}


def uniform_task_arithmetic(
    config: PairConfig, scale: float, out_dtype: str, routers: RouterChoice = _ALIKE
) -> dict[str, Any]:
    """The recipe of task arithmetic (arXiv 2212.04089): the base and `scale` times the sum of all changes."""
    return _recipe(config, "task_arithmetic", {}, {"lambda": scale}, out_dtype, routers)


def uniform_ties(
    config: PairConfig, density: float, scale: float, out_dtype: str, routers: RouterChoice = _ALIKE
) -> dict[str, Any]:
    """The recipe of TIES (arXiv 2306.01708): of every change the share `density`, a vote, the mean, times `scale`."""
    shared = {"lambda": scale, "normalize": True}
    return _recipe(config, "ties", {"density": density}, shared, out_dtype, routers)


def _recipe(
    config: PairConfig,
    method: str,
    own: dict[str, float],
    shared: dict[str, Any],
    out_dtype: str,
    routers: RouterChoice,
) -> dict[str, Any]:
    of_routers = [{"filter": text, "value": routers.weight} for text in routers.filters]
    experts = [
        {"model": model_key(one), "parameters": {"weight": [*of_routers, {"value": 1.0}] if of_routers else 1.0, **own}}
        for one in config.experts_to_merge
    ]
    return {
        "models": [{"model": model_key(config.base)}, *experts],
        "merge_method": method,
        "base_model": model_key(config.base),
        "parameters": shared,
        "dtype": "float32",
        "out_dtype": out_dtype,
        "tokenizer_source": "union",
    }


def _control(name: str, recipe: dict[str, Any]) -> Candidate:
    return Candidate(name, recipe=recipe, role="control")
