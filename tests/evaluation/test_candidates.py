"""What candidates are called in a table.

python -m pytest tests/evaluation/test_candidates.py
"""

from hypothesis import given
from hypothesis import strategies as st

from utils.evaluation.candidates import Candidate, distinct_names

NAMES = st.sampled_from(["a", "a (2)", "a (2) (2)", "b", "TIES"])


@given(st.lists(NAMES, max_size=6), st.sets(NAMES))
def test_names_are_distinct_whatever_files_are_called(names, taken):
    candidates = [Candidate(name, model=f"place/{place}") for place, name in enumerate(names)]
    found = distinct_names(candidates, taken)
    assert [one.model for one in found] == [one.model for one in candidates]
    assert len({one.name for one in found} | taken) == len(found) + len(taken)
    assert all(name in one.name for one, name in zip(found, names, strict=True))


def test_what_is_free_keeps_its_name_and_equal_names_get_their_folders():
    places = ("./one/a", "./two/a", "./two/b", "./two/a", "hub/c", "hub/c")
    found = distinct_names(
        [Candidate(place.removeprefix("./one/").removeprefix("./two/"), model=place) for place in places]
    )
    assert [one.name for one in found] == ["one/a", "two/a", "b", "two/a (2)", "hub/c", "hub/c (2)"]
