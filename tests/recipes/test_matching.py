"""A list of filters is looked through by the plain definition, and in time that does not grow with its length.

python -m pytest tests/recipes/test_matching.py
"""

import time

from hypothesis import given
from hypothesis import strategies as st

from utils.recipes.filters import exact_filters
from utils.recipes.group_filters import group_filters
from utils.recipes.matching import FilterList

texts = st.text("ab.1", max_size=6)


@given(st.lists(texts, max_size=8), st.text("ab.1", max_size=12))
def test_the_first_filter_of_the_list_that_is_a_substring(filters, name):
    found = FilterList(filters)
    assert found.held(name) == {text for text in filters if text in name}
    assert found.place(name) == next((place for place, text in enumerate(filters) if text in name), None)


def _experts(blocks):
    return [
        f"model.layers.{block}.mlp.experts.{expert}.{part}_proj.weight"
        for block in range(blocks)
        for expert in range(32)
        for part in ("gate", "up", "down")
    ]


def _seconds(make, names):
    start = time.process_time()
    make(names)
    return time.process_time() - start


def _one_by_one(names):
    exact_filters(names, names, "model")


def _in_groups(names):
    group_filters({name: place // 3 for place, name in enumerate(names)}, names, "model")


def test_sixteen_times_the_tensors_take_no_fifty_times_as_long():
    for make in (_one_by_one, _in_groups):
        small = min(_seconds(make, _experts(4)) for _ in range(3))
        assert _seconds(make, _experts(64)) < 50 * small  # quadratic: 256 times
