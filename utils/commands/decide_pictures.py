"""The heatmaps that command 2 draws: each expert's densities or weights, layer by component."""

import pandas as pd

from utils.guidance.guided_recipe import GuidedRecipe
from utils.plots import color_range, heatmap
from utils.recipes.coefficients import average, averaged_over, of_components


def pictures(made: GuidedRecipe) -> dict[str, bytes]:
    """PNGs by the end of their file names: a heatmap per expert, all on one color scale, and the guidance's own.

    Densities are those of the measured components, weights those of every tensor; means are as printed.
    """
    settings, decision = made.settings, made.decision
    by_weight = made.choices.method.gives == "weights"
    column, table = ("weight", decision.table) if by_weight else ("density", of_components(decision.table))
    found = {}
    for entry in settings.experts if by_weight or settings.method.keeps else ():
        part = table[table["model"] == entry.type]
        low, high = decision.scale or color_range(float(table[column].min()), float(table[column].max()))
        how = "; ".join(dict.fromkeys(text.split(";")[0] for label, text in decision.how if label in (column, "")))
        title = (
            f"{entry.type}: {settings.method.name} {column}, guidance {made.choices.method.name}\n{how}\n"
            f"mean {average(part, column):.4f} over {averaged_over(part)}"
        )
        found[f"{entry.type}_{column}.png"] = heatmap(by_place(part, column), title, low, high, column)
    return found | dict(decision.pictures())


def by_place(part: pd.DataFrame, column: str) -> pd.DataFrame:
    """One expert's rows as layer x component; what no component is ("other": norms, embeddings) as a mean per layer."""
    blocks = of_components(part)["layer"]
    names = {-1: "before", int(blocks.max()) + 1: "behind"}
    components = part["component"].where(part["component"] != "", "other")
    groups = part.assign(component=components).groupby(["layer", "component"], sort=False)
    wide = groups.apply(lambda rows: average(rows, column), include_groups=False).unstack("component").sort_index()
    order = sorted(dict.fromkeys(components), key=lambda name: name == "other")
    return wide[order].rename(index=lambda layer: names.get(layer, layer))
