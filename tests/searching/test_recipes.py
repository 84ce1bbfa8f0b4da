"""Points become recipes: as command 2 writes them, as stock mergekit merges them, tensor by tensor as the formula says."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.commands_here import done_here
from tests.refusals import refused
from tests.tiny_experts import save_experts
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, tensors
from tests.tiny_mixtures import save_mixtures
from utils.evaluation.controls import TIES_SETTINGS
from utils.evaluation.tasks import evaluation_rows
from utils.guidance.method import guidance_methods
from utils.pair.config import read_pair_config
from utils.recipes.naming import LocalModels
from utils.searching.knowns import knowns, untried
from utils.searching.measurements import find_measurements
from utils.searching.points import Point
from utils.searching.recipes import RecipeMaker
from utils.searching.space import Space
from utils.searching.ways import ways_to_try


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair, measured with every guidance; tests work in its folder."""
    from utils.commands.measure import measure_pair
    from utils.commands.measure_options import MeasureOptions

    folder = save_experts(tmp_path_factory.mktemp("pair"))
    before = Path.cwd()
    os.chdir(folder)
    config = read_pair_config(folder / "pair.yaml")
    for name, method in guidance_methods().items():
        options = {flag.name: flag.default for flag in method.measure_flags}
        measure_pair(MeasureOptions(config, method, options, Path("out") / name, device="cpu"))
    yield folder
    os.chdir(before)


@pytest.fixture
def maker(pair) -> RecipeMaker:
    config = read_pair_config(pair / "pair.yaml")
    measured, _ = find_measurements(config, None, Path("out/search"), trust_remote_code=False)
    assert list(measured) == list(guidance_methods())
    return RecipeMaker(
        config, LocalModels(config.base, config.experts_to_merge), measured, pair / "vectors", "bfloat16"
    )


def test_another_searchs_measurements_change_nothing_once_there_is_a_study(pair, tmp_path):
    """Without a study they are found; with one, what it began with is, wherever that lies."""
    import shutil

    from utils.searching.measurements import identity
    from utils.searching.study import SearchStudy

    config, out = read_pair_config(pair / "pair.yaml"), tmp_path / "search"
    out.mkdir()
    (tmp_path / "other").mkdir()

    def found() -> dict[str, str]:
        return identity(find_measurements(config, None, out, trust_remote_code=False)[0])

    shutil.copytree(pair / "out/lewis", tmp_path / "other/measurements/lewis")
    began = found()
    assert list(began) == ["lewis"]
    space = Space(config.search, ways_to_try(config.search, []), ("code", "math"), 1)
    SearchStudy(out, space, {"measurements": began}, sampler="random", seed=0).close()
    shutil.copytree(pair / "out/sens_merging", tmp_path / "other/measurements/sens_merging")
    assert found() == began


def test_what_was_measured_on_rows_of_a_task_is_left_out(pair):
    """As where nsamples was larger then; a folder that was named is refused."""
    config = read_pair_config(pair / "pair.yaml")
    tasks = evaluation_rows(replace(config, nsamples=2))
    asked = {"trust_remote_code": False, "tasks": tasks}
    measured, notes = find_measurements(config, None, Path("out/search"), **asked)
    assert not measured and all("is left out: measurement" in note for note in notes)
    with refused("evaluation-rows-measured"):
        find_measurements(config, ["out/lewis"], Path("out/search"), **asked)
    assert find_measurements(config, ["out/lewis"], Path("out/search"), trust_remote_code=False)[0]


def test_factors_of_experts_and_depth_are_those_of_the_merge(pair, maker):
    """Uniform task arithmetic with all factors: base + lambda * sum of factor * factor of the block * delta."""
    import torch

    point = Point("task_arithmetic", "uniform", {"lambda": 0.6}, weights={"code": 1.25, "math": 0.75}, depth=(0.8, 1.2))
    merged = tensors(merge_here(pair, maker.make(point).data, "factors"))
    base, code, math = (tensors(pair / name) for name in ("base", "code", "math"))
    for name, value in base.items():
        block = {"0": 0.8, "1": 1.2}[name.split(".")[2]] if ".layers." in name else 1.0
        delta = 1.25 * (code[name].float() - value.float()) + 0.75 * (math[name].float() - value.float())
        wanted = (value.float() + 0.6 * block * delta).to(torch.bfloat16)
        assert torch.allclose(merged[name].float(), wanted.float(), atol=2e-3, rtol=1e-2), name


def test_lines_grow_with_depth(pair, maker):
    data = maker.make(Point("task_arithmetic", "lines", {"lambda": 0.5})).data
    weights = {item.get("filter"): item["value"] for item in data["models"][1]["parameters"]["weight"]}
    assert weights == {"model.layers.0.": 0.5, "model.layers.1.": 1.5, None: 1}


def test_guided_recipes_are_command_twos(pair, maker):
    """LEWIS with gamma, epsilon and lambda, and a method of weights: densities, weights and parameters as it writes them."""
    for guidance, flags, point in (
        (
            "lewis",
            ("--gamma", 0.2, "--epsilon", 0.9, "--lambda", 0.7),
            Point("ties", "lewis", {"lambda": 0.7, "gamma": 0.2, "epsilon": 0.9}),
        ),
        ("sens_merging", ("--lambda", 0.7), Point("task_arithmetic", "sens_merging", {"lambda": 0.7})),
    ):
        out = pair / f"by_command_two_{guidance}"
        given = "--delta_dfs_in_dir", pair / "out" / guidance, "--config_file", pair / "pair.yaml", "--out_dir", out
        done_here("lewis_merge.py", *given, "--guidance", guidance, *flags, cwd=pair)
        (file,) = out.glob("*.yaml")
        written, made = yaml.safe_load(file.read_text()), dict(maker.make(point).data)
        assert (made.pop("dtype"), made.pop("out_dtype")) == ("float32", "bfloat16")
        written.pop("dtype")
        assert made == written


def test_every_default_is_made_again_from_its_numbers(maker):
    """A guided way's defaults, all numbers said, give the recipe that saying none gives, to rounding."""
    space = Space(maker.config.search, ways_to_try(maker.config.search, list(maker.measured)), ("code", "math"), 2)
    for way in (way for way in space.ways if way.guided):
        point = maker.default(way)
        assert all(value is not None for value in point.numbers.values()), way.label
        said, unsaid = maker.make(point), maker.make(Point(way.merge_method, way.guidance, dict.fromkeys(way.numbers)))
        assert said.data["merge_method"] == unsaid.data["merge_method"] and said.stock == unsaid.stock
        left, right = (made.data["models"][1]["parameters"] for made in (said, unsaid))
        for key in left:
            if isinstance(left[key], list):
                values = [[item["value"] for item in own[key]] for own in (left, right)]
                assert values[0] == pytest.approx(values[1], abs=2e-3), (way.label, key)


def test_knowns_run_and_uniform_ones_run_in_stock_mergekit(pair, maker):
    import torch

    space = Space(maker.config.search, ways_to_try(maker.config.search, list(maker.measured)), ("code", "math"), 2)
    listed = knowns(space, maker, 99)
    assert knowns(space, maker, 5) == listed[:5] and len({known.point.merge_method for known in listed[:5]}) > 1
    assert len({known.name for known in listed}) == len(listed)
    guided = [known.point.guidance for known in listed if known.point.guidance != "uniform"]
    leading = list(dict.fromkeys(guided))
    assert guided[: len(leading)] == leading and leading[-1] == "lines"  # one way of each first
    own = next(known.point for known in listed if known.point.guidance == "saliency_budget")
    assert own.merge_method == "guided_mean"
    assert untried(space, listed) == []
    some = knowns(space, maker, 6)
    assert len(untried(space, some)) == sum(way.guidance != "uniform" for way in space.ways) - 2
    assert len({maker.make(known.point).digest for known in listed}) == len(listed)
    ties = {tuple(one.point.numbers[key] for key in ("density", "lambda")) for one in listed
            if one.point.merge_method == "ties" and one.point.uniform}  # fmt: skip
    assert ties == set(TIES_SETTINGS)  # the evaluator's
    searched = {name for name in maker.measured if guidance_methods()[name].searched}
    assert {known.point.guidance for known in listed} == {"uniform", "lines", *searched}
    for known in (listed[0], next(known for known in listed if known.point.merge_method == "ties")):
        made = maker.make(known.point)
        assert made.stock
        ours, stock = (
            tensors(merge_here(pair, made.data, "ours", overwrite=True)),
            tensors(merge_stock(pair, made.data)),
        )
        # equal but for ties among magnitudes, of which small changes in bfloat16 have a few
        same = [torch.eq(ours[name], stock[name]).flatten() for name in ours]
        assert float(torch.cat(same).float().mean()) > 0.95


def test_files_of_vectors_are_written_once_by_their_content(pair, maker):
    first = maker.make(Point("guided_mean", "saliency_budget", {"lambda": 0.9, "power": 0.5, "floor": 0.1}))
    second = maker.make(Point("guided_mean", "saliency_budget", {"lambda": 0.4, "power": 0.3, "floor": 0.0}))
    assert not first.stock and first.vectors == second.vectors and len(first.vectors) == 2
    assert first.digest != second.digest
    assert all(path.is_absolute() and path.is_file() for path in first.vectors)
    assert sorted(path.name for path in (pair / "vectors").iterdir()) == sorted(path.name for path in first.vectors)
    named = [entry["parameters"]["saliency"] for entry in first.data["models"][1:]]
    assert named == list(map(str, first.vectors))
    assert (first.data["parameters"]["power"], second.data["parameters"]["floor"]) == (0.5, 0.0)


@pytest.mark.parametrize("guidance, depth", [("uniform", ()), ("uniform", (0.8, 1.2)), ("lines", ())])
def test_stock_mergekit_has_a_recipe_of_a_mixture_whose_experts_are_stored_apart(
    tmp_path, monkeypatch, guidance, depth
):
    """A merge that adds is the same, stacked or not; what stock mergekit wrote is compared as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = save_mixtures(tmp_path)
    monkeypatch.chdir(folder)
    config = read_pair_config(folder / "pair.yaml")
    models = LocalModels(config.base, config.experts_to_merge)
    maker = RecipeMaker(config, models, {}, folder / "vectors", "float32")
    point = Point("task_arithmetic", guidance, {"lambda": 0.6}, depth=depth)
    ours, stock = maker.make(point), maker.for_stock(point)
    assert not ours.stock and stock.stock and stock.same and "--fused_experts" in stock.note
    cut = Point("ties", guidance, {"lambda": 0.6, "density": 0.5}, depth=depth)
    assert not maker.for_stock(cut).same and "what was scored" in maker.for_stock(cut).note
    places = [merge_here(folder, ours.data, "ours"), merge_stock(folder, stock.data)]
    loaded = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict() for place in places]
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).state_dict()
    for name, value in loaded[0].items():
        assert torch.equal(loaded[1][name], value), name
        assert torch.equal(value, base[name]) == (".mlp.gate." in name), (
            name
        )  # the base's routers, as guided recipes have


def test_stock_mergekit_has_the_means_of_what_guides_a_mixtures_experts(tmp_path, monkeypatch):
    """It merges to the bits of command 3 with stacked experts."""
    folder = save_mixtures(tmp_path, num_hidden_layers=2)
    monkeypatch.chdir(folder)
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "out/lewis", cwd=folder)
    config = read_pair_config(folder / "pair.yaml")
    measured, _ = find_measurements(config, None, Path("out/search"), trust_remote_code=False)
    models = LocalModels(config.base, config.experts_to_merge)
    maker = RecipeMaker(config, models, measured, folder / "vectors", "float32")
    factors = {"weights": {"code": 1.2, "math": 0.8}, "depth": (0.8, 1.2)}
    point = Point("ties", "lewis", {"lambda": 0.6, "gamma": 0.2, "epsilon": 0.8}, **factors)
    stock = maker.for_stock(point)
    assert stock.stock and stock.fused and not stock.same and "the mean of what guides" in stock.note
    assert len(stock.data["models"][1]["parameters"]["density"]) < len(
        maker.make(point).data["models"][1]["parameters"]["density"]
    )
    own = merge_here(folder, stock.data, "own", fused_experts=True)
    assert_same_tensors(own, merge_stock(folder, stock.data))


def test_why_there_is_no_recipe_for_stock_mergekit(maker):
    point = Point("guided_mean", "saliency_budget", {"lambda": 1.0, "power": 0.5, "floor": 0.1})
    assert maker.for_stock(point) == "mergekit-yaml does not know guided_mean, which is this project's"
