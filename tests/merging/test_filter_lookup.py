"""Which filter holds for a tensor, and which for none, against mergekit's own search.

python -m pytest tests/merging/test_filter_lookup.py
"""

from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.config import ConditionalParameter, evaluate_setting

from utils.merging.filter_lookup import by_lookup
from utils.merging.parameters import idle_conditions

names = st.text("abc.", min_size=1, max_size=12)
filters = st.none() | st.just("*") | st.text("abc.*", max_size=4)
values = st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    conditions=st.lists(st.builds(ConditionalParameter, value=values, filter=filters), max_size=12),
    name=names,
    t=st.floats(0, 1),
)
def test_it_is_what_mergekit_finds(conditions, name, t):
    evaluate = by_lookup(evaluate_setting)
    filler = [ConditionalParameter(value=0.5, filter=f"none of them {i}") for i in range(70)]
    for setting in (conditions, [*filler, *conditions], [0.1, 0.9], 0.3):
        assert evaluate(name, setting, t, validate=float) == evaluate_setting(name, setting, t, validate=float)


def test_a_list_is_read_once_and_no_filter_is_tried_alone():
    class Read(str):
        count = 0

        def __contains__(self, text):
            Read.count += 1
            return str.__contains__(self, text)

    setting = [ConditionalParameter(value=i / 1000, filter=f"layers.{i}.mlp") for i in range(1000)]
    evaluate = by_lookup(evaluate_setting)
    for layer in range(1000):
        assert evaluate(Read(f"model.layers.{layer}.mlp.up"), setting, validate=float) == layer / 1000
    assert Read.count == 0


@settings(max_examples=100, deadline=None)
@given(
    conditions=st.lists(st.builds(ConditionalParameter, value=st.just(0.5), filter=filters), max_size=12),
    tensors=st.lists(names, min_size=1, max_size=12),
)
def test_idle_filters_are_those_that_mergekit_takes_for_no_tensor(conditions, tensors):
    numbered = [ConditionalParameter(value=float(place), filter=one.filter) for place, one in enumerate(conditions)]
    found = [evaluate_setting(name, numbered, 0, validate=float) for name in tensors] if numbered else []
    idle = [one.filter for one in numbered if one.value not in found and one.filter not in (None, "", "*")]
    assert idle_conditions(numbered, tensors) == [(text, any(text in name for name in tensors)) for text in idle]
