"""What `search` in the pair config may say; every mistake has a code."""

import dataclasses

import pytest

from tests.refusals import refused
from tests.tiny_pairs import write_config
from utils.pair.config import read_pair_config
from utils.pair.search import SearchSettings, Span


def read(folder, value) -> SearchSettings:
    return read_pair_config(write_config(folder, {"search": value})).search


def test_without_the_key_the_defaults_hold(tmp_path):
    assert read_pair_config(write_config(tmp_path)).search == SearchSettings()
    assert read(tmp_path, None) == SearchSettings()


def test_ranges_numbers_and_names(tmp_path):
    found = read(
        tmp_path,
        {
            "merge_method": "ties",
            "guidance": ["uniform", "lewis"],
            "lambda": [0.2, 1],
            "density": 0.5,
            "floor": 0,
            "depth_groups": 3,
            "options": {"saliency_budget": {"mask": "saliency"}, "sens_merging": {"temperature": [0.5, 1]}},
            "objective_weights": {"math": 2, "code": 0},
        },
    )
    assert (found.merge_method, found.guidance) == (("ties",), ("uniform", "lewis"))
    assert (found.lambda_, found.density, found.floor) == (Span(0.2, 1), Span(0.5, 0.5), Span(0, 0))
    assert found.density.fixed and found.depth_groups == 3
    assert found.options == {"saliency_budget": {"mask": ("saliency",)}, "sens_merging": {"temperature": (0.5, 1)}}
    assert found.objective_weights == {"math": 2, "code": 0}
    assert set(found.plain()) == {field.name for field in dataclasses.fields(SearchSettings)}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("ties", "config-wrong-type"),
        ({"lamda": 1}, "config-unknown-key"),
        ({"lambda": 0}, "config-out-of-range"),
        ({"lambda": [1, 0.2]}, "config-out-of-range"),
        ({"lambda": [0.1, 0.2, 0.3]}, "config-wrong-type"),
        ({"lambda": True}, "config-wrong-type"),
        ({"lambda": float("inf")}, "config-wrong-type"),
        ({"density": [0.1, 1.5]}, "config-out-of-range"),
        ({"gamma": -0.1}, "config-out-of-range"),
        ({"merge_method": []}, "config-wrong-length"),
        ({"merge_method": ["ties", "ties"]}, "config-name-twice"),
        ({"guidance": [1]}, "config-wrong-type"),
        ({"measurements": "~nobody_of_that_name/x"}, "config-no-home"),
        ({"depth_groups": 0}, "config-out-of-range"),
        ({"depth_groups": 2.5}, "config-wrong-type"),
        ({"options": {"lewis": "clip"}}, "config-wrong-type"),
        ({"options": {"lewis": {"bound": [None]}}}, "config-wrong-type"),
        ({"options": {"lewis": {"bound": list(range(101))}}}, "config-wrong-length"),
        ({"lambda": 10**400}, "yaml-bad-value"),
        ({"objective_weights": {"math": -1}}, "config-out-of-range"),
        ({"objective_weights": {"math": 0}}, "config-out-of-range"),
    ],
)
def test_mistakes_have_codes(tmp_path, value, code):
    with refused(code) as caught:
        read(tmp_path, value)
    assert "search" in str(caught.value) or code.startswith("yaml")


def test_the_keys_are_named_as_they_are_written(tmp_path):
    with refused("config-unknown-key") as caught:
        read(tmp_path, {"lambd": 1})
    assert "did you mean 'lambda'" in str(caught.value)
