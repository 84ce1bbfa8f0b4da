"""What guidance `submodule_linearity` says of its result: spread, fit, intervals and non-linearity, and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from utils.guidance.submodule_linearity.intervals import CONFIDENCE
from utils.guidance.submodule_linearity.method import WHOLE
from utils.guidance.submodule_linearity.weights import Misfit, best_uniform_weight
from utils.plots import curves

_LISTED = 120  # weights of an expert; of more only the share that is decided is said
_PER_LINE = 6


@dataclass(frozen=True)
class PartWeights:
    """The weights of one part, [experts] float64, and half the widths of their intervals."""

    layer: int
    name: str
    weights: np.ndarray
    half: np.ndarray


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


def level_line(missed: pd.DataFrame | None) -> list[str]:
    """How many blocks are weighed at each level, and what their merges miss; nothing where one level holds for all.

    Args:
        missed: layer x level, what a block's merge misses on samples its weights have not seen.
    """
    if missed is None:
        return []
    chosen = missed.idxmin(axis=1)
    shown = ", ".join(
        f"{level} in {int((chosen == level).sum())} (mean {missed[level].mean():.1%})" for level in missed
    )
    return [
        f"levels: by what a merged block misses of the experts' changes on unseen samples: {shown} of {len(missed)} "
        f"blocks; as chosen, {missed.min(axis=1).mean():.1%}"
    ]


def interval_lines(table: Sequence[PartWeights], types: Sequence[str], uniform: float) -> list[str]:
    """Per expert, which weights are surely not the uniform one; then each weight, `?` behind the undecided ones.

    Args:
        table: the parts in their order.
        types: the experts.
        uniform: the best one weight for everything.
    """
    lines = []
    for place, name in enumerate(types):
        undecided = [_is_undecided(part, place, uniform) for part in table]
        lines.append(
            f"{name}: {sum(undecided)} of {len(table)} weights are undecided: their {CONFIDENCE:.0%} interval (jackknife "
            f"over samples) spans the uniform weight, {uniform:.4f}"
        )
        kinds: dict[str, list[str]] = {}
        for part, doubt in zip(table, undecided, strict=True):
            own = f"{part.layer}: {part.weights[place]:.3f} ±{part.half[place]:.3f}{' ?' if doubt else ''}"
            kinds.setdefault(part.name, []).append(own)
        for kind, shown in kinds.items() if len(table) <= _LISTED else ():
            for start in range(0, len(shown), _PER_LINE):
                lines.append(f"  {kind if start == 0 else '':<26} " + "  ".join(shown[start : start + _PER_LINE]))
    return lines


def _is_undecided(part: PartWeights, expert: int, uniform: float) -> bool:
    return abs(part.weights[expert] - uniform) <= part.half[expert]


def interval_pictures(
    table: Sequence[PartWeights], types: Sequence[str], uniform: float, blocks: int
) -> dict[str, bytes]:
    """The weights of the blocks' parts over the depth, a line per kind of part, with their intervals; PNGs by name's end."""
    inside = [part for part in table if part.layer in range(blocks)]
    pictures = {}
    for place, name in enumerate(types if inside else ()):
        rows = [(part.layer, part.name, part.weights[place], part.half[place]) for part in inside]
        frame = pd.DataFrame(rows, columns=["layer", "part", "weight", "half"])
        wide, half = (
            frame.pivot_table(index="layer", columns="part", values=column, sort=False).sort_index()
            for column in ("weight", "half")
        )
        title = f"{name}: weights with their {CONFIDENCE:.0%} intervals over calibration samples"
        pictures[f"{name}_interval.png"] = curves(
            wide, title, "layer", "weight", reference=(uniform, "best uniform weight"), half=half, whole=True
        )
    return pictures


def score_lines(scores: pd.DataFrame, types: Sequence[str]) -> list[str]:
    """A line per expert: median and most of the scores at each level; then how they compare with the whole model's."""
    lines = []
    for name in types if len(scores) else ():
        own = scores[scores["model"] == name]
        lines += _against_whole(name, own)
        own = own[own["level"] != WHOLE]
        shown = []
        for level, rows in own.groupby("level", sort=False):
            worst = rows.loc[rows["score"].idxmax()]
            shown.append(
                f"{level} median {_shown(rows['score'].median())}, most {_shown(worst['score'])} "
                f"at layer {worst['layer']}, {worst['submodule']}"
            )
        lines.append(f"{name}: non-linearity (0 is linear): {'; '.join(shown)}")
    return lines


def _against_whole(name: str, scores: pd.DataFrame) -> list[str]:
    """Whether submodules are more linear than the whole model, as arXiv 2504.10902 reports."""
    whole = scores.loc[scores["level"] == WHOLE, "score"]
    parts = scores[scores["level"] != WHOLE]
    if whole.empty or parts.empty:
        return []
    score = float(whole.iloc[0])
    shown = [
        f"{(rows['score'] < score).mean():.0%} of {level} parts are more linear, median {_shown(rows['score'].median())}"
        for level, rows in parts.groupby("level", sort=False)
    ]
    return [f"{name}: the whole model's non-linearity is {_shown(score)}; {'; '.join(shown)}"]


def _shown(score: float) -> str:
    """A score and its root, which is what the pictures show."""
    return f"{score:.2g} (root {score**0.5:.2%})"


def score_pictures(scores: pd.DataFrame, types: Sequence[str]) -> dict[str, bytes]:
    """How far each expert's parts are from linear over the depth, beside its whole model; PNGs by the end of their names.

    The root of the score is shown, in percent: the root mean square of what linearity gets wrong, relative to the whole
    change.
    """
    pictures = {}
    for name in types if len(scores) else ():
        own = scores[scores["model"] == name]
        own = own.assign(score=100 * own["score"] ** 0.5)
        whole, own = own.loc[own["level"] == WHOLE, "score"], own[own["level"] != WHOLE]
        wide = own.pivot_table(index="layer", columns=["level", "submodule"], values="score", sort=False)
        wide.columns = [submodule for _, submodule in wide.columns]
        title = (
            f"{name}: root of the non-linearity, what linearity gets wrong in % of the whole change of a part's output"
        )
        reference = None if whole.empty else (float(whole.iloc[0]), "the whole model")
        pictures[f"{name}_nonlinearity.png"] = curves(
            wide.sort_index(), title, "layer", "deviation from linear, %", reference=reference, whole=True
        )
    return pictures
