"""What a mistyped name was probably meant to be.

python -m pytest tests/test_suggestions.py
"""

import pytest

from utils.suggestions import as_written, nearest, suggestion

KNOWN = ("ties", "dare_ties", "task_arithmetic")


@pytest.mark.parametrize(
    ("name", "near"), [("tiess", "ties"), ("dare-tie", "dare_ties"), ("slerp", None), (3, None), ("t" * 10_000, None)]
)
def test_the_known_name_that_is_most_like_it(name, near):
    assert nearest(name, KNOWN) == near
    assert suggestion(name, KNOWN, "known: x") == (f"did you mean {near!r}?" if near else "known: x")


def test_methods_are_written_as_mergekit_does():
    assert as_written("Task-Arithmetic") == "task_arithmetic"
