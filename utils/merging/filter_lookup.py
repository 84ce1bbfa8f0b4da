"""The filter that holds for a tensor, looked up where mergekit tries one after the other.

A guided recipe of a mixture has a filter for each matrix of each expert, 18,000 of 48 blocks with 128 experts, and as many
tensors: trying every one for every tensor takes minutes before anything is merged. What is found is the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

from utils.mergekit_api import ConditionalParameter
from utils.recipes.matching import FilterList

_FEW = 64  # filters, which are tried in no time
_ANY = (None, "*", "")

EvaluateSetting = Callable[..., Any]


def by_lookup(evaluate: EvaluateSetting) -> EvaluateSetting:
    """A function that says of settings what mergekit's `evaluate_setting` does, in time that does not grow with their length.

    Args:
        evaluate: mergekit's own, which is asked for whatever is no long list of filters.
    """
    # by identity; the settings are kept, so that none is another's
    known: dict[int, tuple[Any, FilterList | None]] = {}

    def looked_up(tensor_name: str, setting: Any, t: float = 0, *, validate: Callable[[Any], Any]) -> Any:
        if not tensor_name or not isinstance(setting, list) or len(setting) <= _FEW:
            return evaluate(tensor_name, setting, t, validate=validate)
        if id(setting) not in known:
            known[id(setting)] = setting, _filters(setting)
        _, filters = known[id(setting)]
        if filters is None:
            return evaluate(tensor_name, setting, t, validate=validate)
        place = filters.place(tensor_name)
        return None if place is None else evaluate(tensor_name, setting[place].value, t, validate=validate)

    return looked_up


def _filters(setting: list[Any]) -> FilterList | None:
    """The filters of a list of conditions; None of a list of values, or a mixture."""
    if not all(isinstance(one, ConditionalParameter) for one in setting):
        return None
    return FilterList(filter_texts(setting))


def filter_texts(conditions: Sequence[ConditionalParameter]) -> list[str]:
    """The filters of conditions, "" for one that holds for every tensor."""
    return ["" if one.filter in _ANY else one.filter for one in conditions]
