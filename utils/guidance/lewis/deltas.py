"""What a fine-tune changed: normalized differences of norms, layer by component."""

from collections.abc import Sequence

import pandas as pd


def delta_table(norms: pd.DataFrame, expert: str, base: str, components: Sequence[str]) -> pd.DataFrame:
    """Normalized norm differences of one expert: `|I_expert - I_base|`, each component's column divided by its sum.

    The sum is over the blocks that have the component.

    A component that the fine-tune did not change at all gets zeros (the formula's 0/0).

    Args:
        norms: tidy norms with at least the columns `model, layer, component, norm`, one row per measured tensor.
        expert: the expert's value in the column `model`.
        base: the base's value there.
        components: the columns of the result, in this order.

    Returns:
        float64, one row per layer (ascending, index 0, 1, ...), one column per component, values in [0, 1]; NaN where a
        block has no such component.

    Raises:
        ValueError: the two models were not measured on the same layers and components, or a norm is not finite.
    """
    tables = []
    for model in (expert, base):
        own = norms[norms["model"] == model]
        if not own["norm"].abs().lt(float("inf")).all():
            raise ValueError(f"the norms of {model} are not finite")
        tables.append(own.pivot(index="layer", columns="component", values="norm").astype("float64"))
    ours, theirs = tables
    wanted = list(components)
    absent = [name for name in wanted if name not in ours.columns or name not in theirs.columns]
    if absent or not ours.index.equals(theirs.index):
        raise ValueError(f"{expert} and {base} were not measured on the same layers and components ({absent})")
    change = (ours[wanted] - theirs[wanted]).abs()
    absent = ours[wanted].isna()
    if not absent.equals(theirs[wanted].isna()) or not (absent | (change < float("inf"))).all(axis=None):
        raise ValueError(f"the norms of {expert} or {base} are incomplete or not finite")
    total = change.sum(axis=0)
    table = change.div(total.where(total > 0, 1.0), axis=1).reset_index(drop=True)
    table.columns = wanted
    return table
