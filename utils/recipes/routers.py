"""How a recipe merges the routers of mixtures: the base's, merged like everything, or with a weight of their own.

A router sends tokens to experts by small differences of its scores. The mean of two routers is neither's, while the base's
still knows the experts, which are fine-tunes of its own. So the base's is taken unless all models share one.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint
from utils.recipes.global_parameters import normalizes
from utils.recipes.group_filters import group_filters
from utils.recipes.method_rules import TASK_ARITHMETIC, DeltaMethod
from utils.recipes.naming import LocalModels, Naming
from utils.recipes.stock import StockNames

if TYPE_CHECKING:
    from utils.recipes.naming import WrittenTensors

BASE, MERGE = "base", "merge"
_WEIGHT = "weight:"

RouterOption = str | float | None  # "base", "merge", a weight, or None: the usual


def router_option(text: str) -> str | float:
    """Read `--router`: base, merge, or weight:x with a number of at least 0.

    Raises:
        argparse.ArgumentTypeError: it is none of them.
    """
    word = text.strip().lower()
    if word in (BASE, MERGE):
        return word
    try:
        value = float(word.removeprefix(_WEIGHT)) if word.startswith(_WEIGHT) else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither base, nor merge, nor weight:x with a number of at least 0"
        )
    return value


@dataclass(frozen=True)
class RouterChoice:
    """What a recipe does with routers.

    Attributes:
        tensors: the names of their tensors, as the merge writes them; none where nothing is written about them.
        filters: what hits just these.
        weight: their weight in every expert.
        said: a line that says so, without the label; "" where the models are no mixtures.
    """

    tensors: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    weight: float = 0.0
    said: str = ""


def choose_routers(
    asked: RouterOption,
    models: LocalModels,
    recorded: Sequence[str],
    method: DeltaMethod,
    parameters: Mapping[str, Any],
) -> RouterChoice:
    """Settle how a recipe merges routers.

    Args:
        asked: the option.
        models: the models that lie on this machine.
        recorded: stored names of routers that were found when the models were measured.
        method: the merge method.
        parameters: its shared parameters.

    Raises:
        UserError: the option would do nothing; a filter cannot be made to hit routers only.
    """
    written = models.written
    if asked == MERGE:
        return RouterChoice(said="merged like everything else (--router merge)")
    names = tuple(dict.fromkeys(recorded)) if written is None else models.routers
    if not names:
        if asked is not None:
            where = "these models are no mixtures of experts" if written else "the base model is not on this machine"
            raise UserError(f"--router has no effect: {where}; leave it out", "flag-no-effect")
        return RouterChoice()
    if asked is None and written is not None and share_routers(written, names, models.checkpoints):
        return RouterChoice(said="all models share one")
    weight = 0.0 if asked in (None, BASE) else float(asked)
    if weight and normalizes(method, parameters):
        raise UserError(
            f"--router weight:{weight:g} has no effect with normalize: true, which divides by the weights again; give base "
            "or merge, or normalize: false in global_parameters",
            "flag-no-effect",
        )
    filters = {name: name for name in names}  # whole names where it is not known what else there is
    if written is not None:
        filters = group_filters(dict.fromkeys(names, ""), written.names, written.where)
    if not weight:
        why = "" if asked else ", since the experts' differ; --router merge merges them"
        said = f"the base's, {len(names)} tensors{why}"
    else:
        said = f"{'changes' if method.averages else 'weight'} times {weight:g}, {len(names)} tensors"
    return RouterChoice(names, tuple(dict.fromkeys(filters.values())), weight, said)


def usual_routers(models: LocalModels) -> RouterChoice:
    """What guided recipes do with routers unless they are asked, for an unguided recipe to be compared with them.

    Where routers cannot be told from other parts, guided recipes are made with --router merge, and so is this one.

    Raises:
        UserError: the models cannot be merged.
    """
    from utils.models.routers import routers_of

    base = models.stored.get(models.base_type)
    try:
        if base is None or not routers_of(base, models.trust_remote_code):
            return RouterChoice()
        return choose_routers(None, models, (), TASK_ARITHMETIC, {})
    except UserError as error:
        if error.code != "router-unknown":
            raise
        return RouterChoice(said=f"merged like everything else ({error})")


def in_stock_mergekit(routers: RouterChoice, stock: StockNames) -> RouterChoice:
    """The same choice by stock mergekit's names."""
    names = tuple(dict.fromkeys(stock.by_own[name] for name in routers.tensors))
    if not names:
        return routers
    filters = group_filters(dict.fromkeys(names, ""), stock.tensors, "stock mergekit")
    return replace(routers, tensors=names, filters=tuple(dict.fromkeys(filters.values())))


def share_routers(written: "WrittenTensors", names: Sequence[str], checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether routers are the same numbers in all models (of which each stores them under a name of its own).

    Raises:
        UserError: a file cannot be read.
    """
    from utils.models.routers import are_alike

    wanted, groups = set(names), []
    for planned in written.plan.tensors:
        if planned.name in wanted:
            stored = [planned.stored_name(one.tensors) for one in checkpoints.values()]
            if None in stored:
                return False
            groups.append([one.tensors[name] for one, name in zip(checkpoints.values(), stored, strict=True)])
    return are_alike(groups)


def without_routers(naming: Naming, routers: RouterChoice, written: "WrittenTensors | None") -> Naming:
    """The same names with filters of groups that leave the routers out, which have filters of their own."""
    if not routers.tensors or naming.group_filters is None:
        return naming
    without = set(routers.tensors)
    left = {name: text for name, text in naming.group_filters.items() if name not in without}
    where = "the recipe" if written is None else written.where
    names = [*naming.group_filters] if written is None else written.names
    return replace(naming, group_filters=group_filters(left, [one for one in names if one not in without], where))
