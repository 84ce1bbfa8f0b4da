"""LEWIS (arXiv 2503.03874): how much a fine-tune changed each layer's activation-weighted norm decides its density.

    I(l,c)  = || |W| o sqrt(s) ||_F                         norm of the Wanda metric, s_j the second moment of input j
    D(l,c)  = | I_expert(l,c) - I_base(l,c) |
    d(l,c)  = D(l,c) / sum over layers of D(.,c)            the delta table: layer x component
    density = gamma + (epsilon - gamma) * (d - min d) / (max d - min d)      over the whole table of one expert

The *measure* half (`LewisVisitor`, `delta_table`) turns a model's blocks into norms and norms into delta tables, the
*decide* half (`densities`) turns delta tables into densities; it needs no torch, which is imported late for that.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from utils.block_runner import MicroBatch
    from utils.decoder import Decoder

METHOD = "lewis"
BOUNDS = ("minmax", "clip")
_DECIMALS = 5  # the released code rounds the deltas before it scales them


class LewisVisitor:
    """Measures the LEWIS norm of every component of every block (a `block_runner.Visitor`).

    `norms` maps (layer, component name) to a float64 scalar tensor on the device, || |W| * sqrt(s) ||_F with s_j the
    sum over real tokens of x_j^2 divided by `divisor`.

    Args:
        decoder: the model.
        tokens: real tokens in all micro-batches; each component must see every one of them once.
        divisor: what the sums of squares are divided by: the token count (ours) or the sample count (the reference).
        sparsity_ratio: share of each row of each linear part that is zeroed by the Wanda metric once a block's norms
            are taken; the pruned block's output feeds the next block.
    """

    def __init__(self, decoder: "Decoder", tokens: int, divisor: int, sparsity_ratio: float) -> None:
        from utils.second_moments import SecondMoments

        self.decoder, self.tokens, self.divisor, self.sparsity_ratio = decoder, tokens, divisor, sparsity_ratio
        paths = [component.path for component in decoder.components]
        self.moments = SecondMoments(decoder.linear_paths if self.rewrites else paths)
        self.norms: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def rewrites(self) -> bool:
        """Pruning replaces weights."""
        return self.sparsity_ratio > 0

    def observing(self, layer: int, block: "nn.Module") -> contextlib.AbstractContextManager[None]:
        """Observe the inputs of the block's linear parts."""
        return self.moments.attached(block)

    def begin(self, batch: "MicroBatch") -> None:
        """Take note of which tokens are real."""
        self.moments.begin(batch)

    def finish(self, layer: int, block: "nn.Module") -> None:
        """Take the block's norms, then prune it if asked."""
        from torch import nn

        from utils.decoder import is_transposed, weight_matrix
        from utils.wanda import metric_norm, pruned

        moments = {path: sums / self.divisor for path, sums in self.moments.checked(layer, self.tokens).items()}
        for component in self.decoder.components:
            weight = weight_matrix(block.get_submodule(component.path))
            self.norms[layer, component.name] = metric_norm(weight, moments[component.path])
        if not self.rewrites:
            return
        for path, moment in moments.items():
            module = block.get_submodule(path)
            new = pruned(weight_matrix(module), moment, self.sparsity_ratio)
            module.weight = nn.Parameter(new.t() if is_transposed(module) else new, requires_grad=False)


def delta_table(norms: "pd.DataFrame", expert: str, base: str, components: Sequence[str]) -> "pd.DataFrame":
    """Normalized norm differences of one expert: `|I_expert - I_base|`, each component's column divided by its sum.

    A component that the fine-tune did not change at all gets zeros (the formula's 0/0).

    Args:
        norms: tidy norms with at least the columns `model, layer, component, norm`, one row per measured tensor.
        expert: the expert's value in the column `model`.
        base: the base's value there.
        components: the columns of the result, in this order.

    Returns:
        float64, one row per layer (ascending, index 0, 1, ...), one column per component, values in [0, 1].

    Raises:
        ValueError: the two models were not measured on the same layers and components, or a norm is not finite.
    """
    tables = []
    for model in (expert, base):
        own = norms[norms["model"] == model]
        tables.append(own.pivot(index="layer", columns="component", values="norm").astype("float64"))
    ours, theirs = tables
    wanted = list(components)
    absent = [name for name in wanted if name not in ours.columns or name not in theirs.columns]
    if absent or not ours.index.equals(theirs.index):
        raise ValueError(f"{expert} and {base} were not measured on the same layers and components ({absent})")
    change = (ours[wanted] - theirs[wanted]).abs()
    if not (change < float("inf")).all(axis=None):  # false for NaN too
        raise ValueError(f"the norms of {expert} or {base} are incomplete or not finite")
    total = change.sum(axis=0)
    table = change.div(total.where(total > 0, 1.0), axis=1).reset_index(drop=True)
    table.columns = wanted
    return table


def densities(deltas: "pd.DataFrame", gamma: float, epsilon: float, bound: str = "minmax") -> "pd.DataFrame":
    """Densities of one expert from its delta table.

    `minmax` is the released code's map: the smallest delta of the table gets `gamma`, the largest `epsilon`. `clip` is
    the paper's wording: the deltas, relative to the largest, are clipped to [gamma, epsilon]. Deltas are rounded to
    five decimals first. Where all are equal nothing is known to matter more, and all get `(gamma + epsilon) / 2`.

    Args:
        deltas: layer x component, finite and not negative.
        gamma: density of what changed least, 0 to 1.
        epsilon: density of what changed most, gamma to 1.
        bound: `minmax` or `clip`.

    Returns:
        float64 in the same layout, within [gamma, epsilon] up to one rounding of float64 (the operations are in the
        released code's order, so that its numbers come out bit for bit).
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound {bound!r} is not one of {BOUNDS}")
    # Python's round is exact in decimal; numpy's, which multiplies, differs in the last place.
    rounded = deltas.map(lambda value: round(float(value), _DECIMALS))
    low, high = float(rounded.min(axis=None)), float(rounded.max(axis=None))
    if low == high:
        return rounded * 0.0 + (gamma + epsilon) / 2
    if bound == "clip":
        return (rounded / high).clip(gamma, epsilon)
    return gamma + (rounded - low) / (high - low) * (epsilon - gamma)


def share_at_bounds(density: "pd.DataFrame", gamma: float, epsilon: float) -> tuple[float, float]:
    """The shares of a density table's entries that are exactly `gamma`, and exactly `epsilon`."""
    return float((density == gamma).to_numpy().mean()), float((density == epsilon).to_numpy().mean())
