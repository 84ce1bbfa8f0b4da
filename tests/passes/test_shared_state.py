"""Mappings that blocks share: copies are independent, and what a block leaves is found."""

from collections import UserDict

from utils.passes.shared_state import entries, left_behind, mappings, put_back, with_copies


def test_a_second_call_leaves_nothing_in_the_mappings_of_the_first():
    shared, plain = UserDict(a=(1, 2)), {"t": 3}
    args, kwargs = with_copies((0, shared), {"x": plain, "y": None})
    args[1]["b"], kwargs["x"]["t"] = 5, 4
    assert shared == {"a": (1, 2)} and plain == {"t": 3}
    assert type(args[1]) is UserDict and args[1]["a"] is shared["a"] and (args[0], kwargs["y"]) == (0, None)


def test_what_is_added_or_replaced_is_found_and_put_back():
    shared = UserDict(a=(1, 2), c=(9,))
    args, _ = with_copies((shared,), {})
    shared["a"], shared["b"] = (1, 2, 3), (4,)
    left = left_behind(mappings(args, {}), mappings((shared,), {}))
    assert left == {(0, "a"): (1, 2, 3), (0, "b"): (4,)}
    put_back(left, mappings(args, {}))
    assert args[0] == shared
    assert list(entries(mappings((), {"m": {"b": 1, "a": 2}, "n": 5}))) == [2, 1]
