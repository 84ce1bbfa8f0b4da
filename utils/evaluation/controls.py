"""What any careful user would try by hand: uniform task arithmetic and uniform TIES, at several settings.

Which setting stands for each kind is chosen on validation rows, so that a candidate is compared with uniform merges at
their best (LiNeS and others are the search's).
"""

from typing import Any

from utils.evaluation.candidates import Candidate
from utils.pair.config import PairConfig
from utils.recipes.recipe import model_key

# the most telling first: a search, whose yardstick these are, too, may try only some
SCALES = (0.35, 0.2, 0.5, 1.0, 0.7)  # lambda of task arithmetic
TIES_SETTINGS = ((0.5, 1.0), (0.2, 1.0), (0.5, 0.35), (0.2, 0.35))  # density, lambda
TASK_ARITHMETIC, TIES = "task arithmetic", "TIES"


def uniform_controls(config: PairConfig, out_dtype: str) -> dict[str, list[Candidate]]:
    """The uniform merges of a pair at every setting, by kind.

    Args:
        config: the pair.
        out_dtype: torch name of the dtype that they are rounded to, the base's own.
    """
    arithmetic = [
        _control(f"{TASK_ARITHMETIC} {scale:g}", uniform_task_arithmetic(config, scale, out_dtype)) for scale in SCALES
    ]
    ties = [
        _control(f"{TIES} density {density:g}, {scale:g}", uniform_ties(config, density, scale, out_dtype))
        for density, scale in TIES_SETTINGS
    ]
    return {TASK_ARITHMETIC: arithmetic, TIES: ties}


def uniform_task_arithmetic(config: PairConfig, scale: float, out_dtype: str) -> dict[str, Any]:
    """The recipe of task arithmetic (arXiv 2212.04089): the base and `scale` times the sum of all changes."""
    return _recipe(config, "task_arithmetic", {"weight": 1.0}, {"lambda": scale}, out_dtype)


def uniform_ties(config: PairConfig, density: float, scale: float, out_dtype: str) -> dict[str, Any]:
    """The recipe of TIES (arXiv 2306.01708): of every change the share `density`, a vote, the mean, times `scale`."""
    shared = {"lambda": scale, "normalize": True}
    return _recipe(config, "ties", {"weight": 1.0, "density": density}, shared, out_dtype)


def _recipe(
    config: PairConfig, method: str, own: dict[str, float], shared: dict[str, Any], out_dtype: str
) -> dict[str, Any]:
    experts = [{"model": model_key(entry), "parameters": dict(own)} for entry in config.experts]
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
