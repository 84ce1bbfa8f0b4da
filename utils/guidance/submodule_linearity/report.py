"""What guidance `submodule_linearity` says of its result: spread, fit and non-linearity in words, and its pictures."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from utils.guidance.submodule_linearity.weights import Misfit, best_uniform_weight


def spread_lines(types: Sequence[str], weights: Sequence[np.ndarray]) -> list[str]:
    """A line per expert: the range of its weights over the parts, and how many are negative."""
    lines = []
    for place, name in enumerate(types):
        own = [float(weight[place]) for weight in weights]
        negative = sum(value < 0 for value in own)
        lines.append(
            f"{name}: weights of {len(own)} parts from {min(own):.4f} to {max(own):.4f}, mean {sum(own) / len(own):.4f}, "
            f"{negative} negative ({negative / len(own):.0%})"
        )
    return lines


def fit_lines(fits: Sequence[Misfit], weights: Sequence[np.ndarray]) -> list[str]:
    """What the merge is predicted to miss, beside the best that one weight for everything could do."""
    moved = [(fit, own) for fit, own in zip(fits, weights, strict=True) if fit.c > 0]
    if not moved:
        return []
    best = best_uniform_weight(fits)
    ours = np.mean([fit.missed(own) for fit, own in moved])
    uniform = np.mean([fit.missed(np.full_like(own, best)) for fit, own in moved])
    return [
        f"fit: were all parts linear, {ours:.1%} of what each expert changes on its own text would be missed; with one "
        f"weight for all, {best:.4f} at best, {uniform:.1%}; by the base 100% (means over {len(moved)} parts)"
    ]


def score_lines(scores: pd.DataFrame, types: Sequence[str]) -> list[str]:
    """A line per expert: median and most of the scores at each level."""
    lines = []
    for name in types if len(scores) else ():
        own = scores[scores["model"] == name]
        shown = []
        for level, rows in own.groupby("level", sort=False):
            worst = rows.loc[rows["score"].idxmax()]
            shown.append(
                f"{level} median {_shown(rows['score'].median())}, most {_shown(worst['score'])} "
                f"at layer {worst['layer']}, {worst['submodule']}"
            )
        lines.append(f"{name}: non-linearity (0 is linear): {'; '.join(shown)}")
    return lines


def _shown(score: float) -> str:
    """A score and its root, which is what the pictures show."""
    return f"{score:.2g} (root {score**0.5:.2%})"


def score_pictures(scores: pd.DataFrame, types: Sequence[str]) -> dict[str, bytes]:
    """A heatmap per expert of how far its parts are from linear, on one color scale; PNGs by the end of their names.

    The root of the score is shown, in percent: the root mean square of what linearity gets wrong, relative to the whole
    change.
    """
    from utils.plots import heatmap

    pictures = {}
    top = 100 * float(scores["score"].max()) ** 0.5 if len(scores) else 0.0
    for name in types if len(scores) else ():
        own = scores[scores["model"] == name]
        own = own.assign(score=100 * own["score"] ** 0.5)
        wide = own.pivot_table(index="layer", columns=["level", "submodule"], values="score", sort=False)
        wide.columns = [submodule for _, submodule in wide.columns]
        title = (
            f"{name}: root of the non-linearity, what linearity gets wrong in % of the whole change of a part's output"
        )
        pictures[f"{name}_nonlinearity.png"] = heatmap(wide.sort_index(), title, 0.0, top, "deviation from linear, %")
    return pictures
