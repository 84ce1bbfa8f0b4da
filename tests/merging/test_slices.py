"""Slices: blocks take the places of blocks with the same tensors, or are refused with the reason."""

import pytest

from tests.refusals import refused
from tests.tiny_merges import merge_here
from tests.tiny_mixtures import save_mixtures, weights


@pytest.fixture(scope="module")
def jambas(tmp_path_factory):
    """A hybrid of four blocks, experts in every second one."""
    return save_mixtures(tmp_path_factory.mktemp("hybrids"), "jamba")


def sliced(folder, *ranges):
    slices = [{"sources": [{"model": str(folder / "base"), "layer_range": list(one)}]} for one in ranges]
    return {"slices": slices, "merge_method": "passthrough", "dtype": "float32"}


def test_blocks_in_places_of_another_kind_are_refused(jambas):
    with refused("recipe-slices-unlike", "layer 1 in the place of layer 0: it"):
        merge_here(jambas, sliced(jambas, (1, 4)), "shifted")


def test_layers_that_a_model_does_not_have_are_refused(jambas):
    with refused("recipe-no-such-layer", "has 4 layers, not [2, 5]"):
        merge_here(jambas, sliced(jambas, (0, 2), (2, 5)), "beyond")


def test_blocks_of_the_base_alone_make_a_model_with_a_card(jambas):
    recipe = {**sliced(jambas, (0, 4)), "merge_method": "task_arithmetic", "base_model": str(jambas / "base")}
    assert (
        "A merge of `base` by mergekit's `task_arithmetic`"
        in (merge_here(jambas, recipe, "alone") / "README.md").read_text()
    )


def test_more_blocks_than_the_base_has_are_refused(jambas):
    with refused("recipe-slices-unlike", "the base has no such layer"):
        merge_here(jambas, sliced(jambas, (0, 4), (2, 4)), "longer")


def test_blocks_of_the_same_kind_change_places(jambas):
    merged = weights(merge_here(jambas, sliced(jambas, (2, 4), (2, 4)), "twice"))
    base = weights(jambas / "base")
    moved = {name: name.replace(".layers.0.", ".layers.2.").replace(".layers.1.", ".layers.3.") for name in merged}
    assert moved.keys() == base.keys()
    assert all((merged[name] == base[other]).all() for name, other in moved.items())
