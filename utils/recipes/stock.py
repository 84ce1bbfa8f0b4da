"""What stock mergekit makes of a recipe's models: whether it can merge them, and what it calls their tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import UserError
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.mergekit_plans import MergekitInputs, mergekit_candidates
from utils.models.planned_tensors import ADJUSTED, DEFINITION, INFERENCE, STORED
from utils.recipes.method_rules import DeltaMethod
from utils.recipes.naming import LocalModels, WrittenTensors


@dataclass(frozen=True)
class StockNames:
    """The names that stock mergekit matches filters on: all of them, and by the name that a tensor has in a merge here."""

    tensors: tuple[str, ...]
    by_own: Mapping[str, str]


def reason_against_stock(method: DeltaMethod, written: WrittenTensors | None) -> str:
    """Why a recipe by a method is for this project's command 3 alone, as a clause; "" where `mergekit-yaml` runs it too."""
    if method.own:
        return f"mergekit-yaml does not know {method.name}, which is this project's"
    return models_against_stock(written)


def models_against_stock(written: WrittenTensors | None) -> str:
    """The same of the models alone, whatever the method."""
    if written is None:
        return ""
    if written.base.stacks:
        return "each of the stacked experts has numbers of its own, whose filters mergekit-yaml would pass over"
    if written.plan.origin == STORED:
        return "tensors are called as the base stores them, while mergekit-yaml calls some otherwise or loses them"
    if written.plan.origin == ADJUSTED:
        return f"mergekit-yaml stops at these models ({' '.join(written.plan.reason.split())})"
    return ""


def stock_names(models: LocalModels) -> StockNames:
    """The names that stock mergekit has for a merge's tensors.

    Raises:
        UserError: the base is not on this machine; stock mergekit cannot merge these models, or loses tensors of theirs.
    """
    written = models.written
    if written is None:
        raise UserError(
            "--portable needs the base model on this machine, for stock mergekit's names; put it where the config says",
            "flag-no-base",
        )
    stored = models.stored
    base = stored[models.base_type]
    others = tuple(one for key, one in stored.items() if key != models.base_type)
    if any(one.architecture != base.architecture for one in others):
        raise _refused("its models are of different classes")
    with quiet_mergekit():
        first = next(mergekit_candidates(MergekitInputs(base, others, models.trust_remote_code)))
    if first.plan.origin not in (DEFINITION, INFERENCE):
        raise _refused(first.plan.reason)
    if first.lacking:
        name, absent = first.lacking[0]
        raise _refused(f"it asks for {absent[0]}, which {name} does not store")
    if first.lost:
        raise _refused(f"it would lose {first.lost[0][1][0]} without a word")
    if first.plan.origin == INFERENCE and any(one.adapter for one in others):
        raise _refused("it ships no definition of them, and cannot infer one beside an adapter")
    stack_of = {one.name: name for name, stack in written.base.stacks.items() for one in stack.slices}
    spelled = {name: first.plan.spellings.get(stack_of.get(name, name)) for name in written.names}
    if absent := [name for name, own in spelled.items() if own is None]:
        raise _refused(f"it has no name for {absent[0]}")
    return StockNames(tuple(dict.fromkeys(one.name for one in first.plan.tensors)), spelled)


def _refused(why: str) -> UserError:
    text = (
        f"--portable: stock mergekit cannot merge these models: {why}; merge with utils/merger.py, without --portable"
    )
    return UserError(text, "recipe-not-portable")
