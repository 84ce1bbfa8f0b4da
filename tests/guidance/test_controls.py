"""The unguided recipe beside a guided one: every guidance with every control, held to what the report says of it.

python -m pytest tests/guidance/test_controls.py
"""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.commands_here import done_here
from tests.selected import few
from tests.tiny_pairs import CALIBRATION, save_pair, write_config
from tests.tiny_recipes import decide_here, measure_here
from utils.guidance.method import guidance_methods
from utils.recipes.recipe import CONTROLS

USELESS = {"accept_useless_text": True}  # random models gain nothing on their texts
MEASURED = {
    "gram_mean": USELESS,
    "submodule_linearity": {"nonlinearity": False},
    "tuned": {"tune_steps": 2, "tune_level": "expert", **USELESS},
}
START = "start/pair_generated_gram_mean_gram_mean_merge_config.yaml"
MEAN = "start/pair_generated_guided_mean_saliency_budget_merge_config.yaml"
AVERAGED = 0.5  # of two experts, by what averages

# guidance, its dataframe folder, flags, and the control's mean weight (None: that of the guided recipe)
CASES = {
    "lewis": ("lewis", "lewis", {}, 1.0),
    "lewis, weights": ("lewis", "lewis", {"apply_lewis_to_weights": True}, None),
    "sens_merging": ("sens_merging", "sens_merging", {}, None),
    "submodule_linearity": ("submodule_linearity", "submodule_linearity", {}, None),
    "saliency_budget": ("saliency_budget", "saliency_budget", {}, 1.0),
    "saliency mask": ("saliency_budget", "saliency_budget", {"mask": "saliency"}, 1.0),
    "guided_mean": ("saliency_budget", "saliency_budget", {"merge_method": "guided_mean"}, AVERAGED),
    "gram_mean": ("gram_mean", "gram_mean", {}, AVERAGED),
    "gram_mean, sparse": ("gram_mean", "gram_mean", {"mean_density": 0.3}, AVERAGED),
    "gram_mean, low rank": ("gram_mean", "gram_mean", {"mean_density": 0.3, "form": "low_rank"}, AVERAGED),
    "tuned": ("tuned", "tuned", {}, None),
    "tuned from gram_mean": ("tuned", "tuned_gram_mean", {}, AVERAGED),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("pair"))
    write_config(folder, {"calibration": CALIBRATION, "nsamples": 2, "global_parameters": {"normalize": False}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in guidance_methods():
            measure_here(name, name, **MEASURED.get(name, {}))
        decide_here("gram_mean", "gram_mean", "start")
        decide_here("saliency_budget", "saliency_budget", "start", merge_method="guided_mean")
        measure_here("tuned", "tuned_gram_mean", tune_steps=1, start_recipe=START, **USELESS)
    return folder


@pytest.fixture
def pair(measured, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(measured, tmp_path / "pair")
    monkeypatch.chdir(folder)
    return folder


def value_of(setting: object, tensor: str) -> float:
    """A parameter's value for a tensor, as mergekit reads it."""
    if not isinstance(setting, list):
        return float(setting)
    return next(float(one["value"]) for one in setting if one.get("filter", "") in tensor)


def sizes_of(guided: dict) -> dict[str, int]:
    """The parameters of what a recipe has values for by filter, by tensor; of linear layers where it has none."""
    from tests.tiny_merges import tensors

    found = {name: value.numel() for name, value in tensors(Path("base")).items()}
    filters = [one["filter"] for key in ("weight", "factor") for one in guided.get(key, ()) if "filter" in one]
    return {name: size for name, size in found.items() if any(text in name for text in filters or ["proj"])}


def test_every_guidance_has_a_case():
    assert {guidance for guidance, *_ in CASES.values()} == set(guidance_methods())


@pytest.mark.parametrize(
    ("case", "kind"),
    few(
        itertools.product(CASES, CONTROLS),
        *((case, "uniform") for case in CASES),
        *((case, "lines") for case in ("lewis", "lewis, weights", "sens_merging", "guided_mean", "tuned")),
    ),
)
def test_a_control_has_the_weight_that_the_report_says(pair, case, kind, capsys):
    guidance, folder, asked, weight = CASES[case]
    guided, control = (
        yaml.safe_load(path.read_text())["models"][1:] for path in decide_here(guidance, folder, control=kind, **asked)
    )
    said = re.findall(r"^  control .*weight ([0-9.]+)(?: to ([0-9.]+))?", capsys.readouterr().out, re.M)
    for number, model in enumerate(control):
        sizes = sizes_of(guided[number]["parameters"])
        own = {name: value_of(model["parameters"]["weight"], name) for name in sizes}
        mean = sum(own[name] * size for name, size in sizes.items()) / sum(sizes.values())
        low, high = min(own.values()), max(own.values())
        expected = weight
        if weight is None:
            wanted = {name: value_of(guided[number]["parameters"]["weight"], name) for name in sizes}
            expected = sum(wanted[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert mean == pytest.approx(expected, rel=1e-6)
        if kind == "uniform":
            assert low == high
        else:
            assert high == pytest.approx(3 * low)
        if said or kind == "lines" or weight != 1:
            shown = [float(one) for one in said[number] if one]
            assert shown == pytest.approx([low, high][: len(shown)], abs=1e-4)


def printed_next(said: str) -> list[str]:
    """The words behind the interpreter of the first command that is to be pasted next."""
    lines = said.split("next:\n")[1].replace("\\\n", " ").splitlines()
    return shlex.split(lines[0])[1:]


@pytest.mark.parametrize("start", ["", START, MEAN])
def test_the_command_that_is_printed_after_tuning_makes_the_recipe_of_its_start(pair, start, capsys):
    measure_here("tuned", "again", tune_steps=1, start_recipe=start or None, **USELESS)
    script, *words = printed_next(capsys.readouterr().out)
    done_here(Path(script).name, *words)
    (path,) = Path("merge_configs").glob("*.yaml")
    method = yaml.safe_load(Path(start).read_text())["merge_method"] if start else "task_arithmetic"
    assert yaml.safe_load(path.read_text())["merge_method"] == method
    (same,) = decide_here("tuned", "again", "same")
    assert same.read_bytes() == path.read_bytes()


def test_forms_have_names_of_their_own_and_say_what_they_are(pair, capsys):
    paths = [decide_here("gram_mean", "gram_mean", mean_density=0.3, form=form)[0] for form in ("sparse", "low_rank")]
    said = capsys.readouterr().out
    assert len(set(paths)) == 2 and all(path.is_file() for path in paths)
    assert "method:   gram_mean, keeps entries, fitted anew to answer like the whole; takes" in said
    assert "method:   gram_mean, keeps two factors of low rank; takes" in said and "--adapter" not in said


def test_best_of_one_expert_is_the_sparse_refit(pair, capsys):
    config = yaml.safe_load(Path("pair.yaml").read_text())
    write_config(pair, {**config, "target_model_names": {"math": "./math"}})
    words = ["--delta_dfs_in_dir", "gram_mean", "--config_file", "pair.yaml", "--out_dir"]
    done = done_here("lewis_merge.py", *words, "best", "--guidance", "best")
    (best,) = Path("best").glob("*.yaml")
    (asked,) = decide_here("gram_mean", "gram_mean", mean_density=0.1)
    assert best.name == asked.name and best.read_bytes() == asked.read_bytes()
    assert "density:  0.1 of each linear layer's entries" in done.stdout
    assert (
        "1 / gain" not in done.stdout and "row by row" not in done.stdout and "will be math itself" not in done.stderr
    )
    capsys.readouterr()
    decide_here("gram_mean", "gram_mean", "whole")
    assert "the model will be math itself" in capsys.readouterr().err
    decide_here("gram_mean", "gram_mean", "small", mean_density=0.3, form="low_rank")
    assert "--adapter" in capsys.readouterr().out
    measure_here("gram_mean", "again", **USELESS)
    assert "--mean_density 0.1" in capsys.readouterr().out
