"""The space of a pair: which ways there are, what a sampler may choose, and that a point and its parameters agree."""

import pytest

pytest.importorskip("optuna")

import optuna

from tests.refusals import refused
from utils.guidance.method import guidance_methods
from utils.pair.search import SearchSettings, Span
from utils.recipes.method_rules import OWN_METHODS
from utils.searching.points import Point
from utils.searching.space import Space
from utils.searching.ways import ways_to_try

EXPERTS = ("code", "math")


def space(measured=(), blocks=6, experts=EXPERTS, **settings):
    settings = SearchSettings(**{key.rstrip("_"): value for key, value in settings.items()})
    return Space(settings, ways_to_try(settings, list(measured)), experts, blocks)


def test_without_measurements_there_are_the_unguided_ways():
    assert [way.label for way in space().ways] == [
        "task_arithmetic, uniform",
        "ties, uniform",
        "task_arithmetic, lines",
    ]


def test_every_method_that_measured_has_its_ways_and_numbers():
    found = space(guidance_methods())
    for name, method in guidance_methods().items():
        ways = [way for way in found.ways if way.guidance == name]
        if not method.searched:
            assert not ways
            continue
        assert method.merge_method in [way.merge_method for way in ways]
        assert set(method.own_merge_methods) <= {way.merge_method for way in ways}
        if method.merge_method in method.own_merge_methods:
            assert set(method.own_merge_methods) == {way.merge_method for way in ways}
        for way in ways:
            assert way.numbers[0] == "lambda"
            if way.merge_method not in OWN_METHODS and name == "lewis":
                assert way.numbers == ("lambda", "gamma", "epsilon")
            if way.merge_method == "guided_mean":
                assert way.numbers == ("lambda", "power", "floor")


def test_what_is_suggested_is_what_the_parameters_say():
    """Round trip: a point the sampler chose, queued by its parameters, comes back as the same point."""
    found = space(guidance_methods(), depth_groups=3, options={"saliency_budget": {"mask": ("magnitude", "saliency")}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    ways = set()
    for _ in range(120):
        point = found.suggest(study.ask())
        ways.add((point.merge_method, point.guidance))
        assert Point.read(point.plain()) == point
        assert sum(point.weights.values()) == pytest.approx(2) and sum(point.depth) == pytest.approx(3)
        inside = found.settings.weights.holds
        if all(map(inside, point.weights.values())) and all(map(inside, point.depth)):
            again = optuna.create_study()
            again.enqueue_trial(found.parameters(point))
            back = found.suggest(again.ask())
            assert back.numbers == point.numbers and back.options == point.options
            assert list(back.weights.values()) == pytest.approx(list(point.weights.values()))
            assert back.depth == pytest.approx(point.depth)
    assert ways == {(way.merge_method, way.guidance) for way in found.ways}


def test_a_point_outside_has_no_parameters():
    found = space(lambda_=Span(0.2, 0.9))
    assert found.parameters(Point("task_arithmetic", "uniform", {"lambda": 1.0})) is None
    assert found.parameters(Point("task_arithmetic", "lewis", {"lambda": 0.5})) is None
    assert found.parameters(Point("ties", "uniform", {"lambda": 0.5})) is None
    assert found.parameters(Point("task_arithmetic", "uniform", {"lambda": 0.5}))["lambda"] == 0.5


def test_what_is_fixed_is_not_searched():
    found = space(
        merge_method=("ties",), guidance=("uniform",), density=Span(0.5, 0.5), weights=Span(1, 1), depth_groups=1
    )
    study = optuna.create_study()
    trial = study.ask()
    assert found.suggest(trial) == Point("ties", "uniform", {"lambda": trial.params["lambda"], "density": 0.5})
    assert set(trial.params) == {"method", "lambda"}
    assert found.continuous() and not space().continuous()


def test_ends_that_cross_are_swapped():
    found = space(["lewis"], guidance=("lewis",), gamma=Span(0.9, 0.9), epsilon=Span(0.2, 0.2))
    assert found.suggest(optuna.create_study().ask()).numbers["gamma"] == 0.2


def test_one_expert_and_one_block_have_no_factors():
    found = space(experts=("code",), blocks=1)
    assert found.weighed == () and found.depth_groups == 0


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"guidance": ("lewis",)}, "search-not-measured"),
        ({"guidance": ("lewi",)}, "search-unknown-guidance"),
        ({"guidance": ("best",)}, "search-unknown-guidance"),
        ({"merge_method": ("slerp",)}, "search-unknown-merge-method"),
        ({"merge_method": ("tise",)}, "search-unknown-merge-method"),
        ({"merge_method": ("guided_mean",)}, "search-nothing-to-try"),
        ({"options": {"nobody": {"a": (1,)}}}, "search-unknown-guidance"),
        ({"options": {"lewis": {"bund": ("clip",)}}}, "search-unknown-option"),
        ({"options": {"lewis": {"bound": ("clop",)}}}, "search-unknown-option"),
        ({"options": {"lewis": {"gamma": (0.2,)}}}, "search-unknown-option"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, code):
    with refused(code):
        space(**settings)
