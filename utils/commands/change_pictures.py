"""Heatmaps of what a merge by vectors makes of each expert, whose recipe has no numbers of its own to draw.

page = with_change_shares(evaluation_page(...), scorer, evaluated, store, say)
"""

from collections.abc import Callable
from dataclasses import replace

from utils.commands.evaluate_page import model_types
from utils.commands.evaluated import Evaluated
from utils.commands.report_recipe import is_drawn, layer_heatmap
from utils.evaluation.scoring import Scorer
from utils.evaluation.store import LossStore
from utils.merging.change_shares import change_shares
from utils.publishing.manifest import sha256_of
from utils.reports.values import Page

QUANTITY = "share of its change in the merge"
_MEANING = (
    "How much of each expert's change is in the merge: 0 is nothing of it, 1 is all of it, below 0 is against it."
)


def with_change_shares(
    page: Page, scorer: Scorer, evaluated: Evaluated, store: LossStore, say: Callable[[str], None]
) -> Page:
    """A page with a heatmap for each expert of the share of its change that is in the winner.

    Only where the winner's recipe has nothing else to draw, and files of vectors decide what is merged. It takes one pass
    over the inputs, unless the store has the numbers; they are kept there.

    Raises:
        UserError: an input cannot be read.
    """
    winner = next((one for one in evaluated.candidates if one.name == evaluated.winner), None)
    if page.recipe is None or page.recipe.heatmaps or winner is None or winner.recipe is None:
        return page
    planned = scorer.planned(winner)
    if not planned.saliency:
        return page
    shapes = {one.name: one.merged_shape for one in planned.plan.tensors if is_drawn(one.name, one.merged_shape)}
    key = sha256_of(["shares of changes", scorer.fingerprint(winner), scorer.settings.record()])
    kept = store.find_record(key)
    if kept is None:
        say(f"{winner.name}: one more pass over the models shows how much of each expert's change is in it")
        kept = {"shares": change_shares(planned, shapes)}
        store.keep_record(key, {"candidate": winner.name, **kept})
    inputs, called = planned.plan.inputs, model_types(scorer)
    experts = [one for one in inputs.models if one.reference != inputs.config.base_model]
    drawn = []
    for model, shares in zip(experts, kept["shares"], strict=True):
        title = called.get(model.checkpoint.folder, model.label)
        drawn.append(layer_heatmap(title, QUANTITY, ((name, shapes[name], value) for name, value in shares.items())))
    heatmaps = tuple(one for one in drawn if one is not None)
    return replace(page, recipe=replace(page.recipe, heatmaps=heatmaps, heatmaps_show=_MEANING if heatmaps else ""))
