"""A recipe as a report shows it: every number of it is what the merge will use, taken from the recipe by hand here."""

import dataclasses
from pathlib import Path

import pytest

from tests.tiny_merges import recipe, save_models, write_recipe
from utils.commands.report_recipe import layer_heatmap, merge_page, model_records, planned_recipe
from utils.merging.planning import PlannedMerge, plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.settings import MergeSettings
from utils.reports.page import render
from utils.reports.values import Run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("llamas"))
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def planned(folder: Path, data: dict) -> PlannedMerge:
    settings = MergeSettings(folder / "merged", write_recipe(folder / "mine.yaml", data), device="cpu")
    return plan_recipe(settings, read_recipe(settings.merge_config), lambda line: None)


def test_densities_by_layer_and_component(models):
    found = planned_recipe(planned(models, recipe(models, "ties")))
    assert [(one.title, one.quantity) for one in found.heatmaps] == [("code", "density"), ("math", "density")]
    for heatmap in found.heatmaps:
        assert heatmap.layers == ("0", "1", "2")
        assert set(heatmap.components) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        for layer, row in enumerate(heatmap.cells):
            cells = dict(zip(heatmap.components, row, strict=True))
            assert cells.pop("down_proj") == pytest.approx(0.3 + 0.1 * layer)
            assert set(cells.values()) == {0.6}
    facts = dict(found.facts)
    assert facts["merge method"] == "ties" and facts["saved in"] == "bfloat16"
    assert (facts["weight, code"], facts["weight, math"]) == ("1", "0.75")
    assert facts["density, code, model.embed_tokens"] == "0.6"
    assert found.text.startswith("models:") and str(models) not in found.text


def test_what_is_the_same_everywhere_is_a_fact_and_no_picture(models):
    found = planned_recipe(planned(models, recipe(models, "task_arithmetic", parameters={"lambda": 0.4})))
    assert found.heatmaps == () and dict(found.facts)["lambda"] == "0.4"


def test_the_experts_of_a_layer_share_a_column():
    layer = "model.layers.{}.block_sparse_moe.{}.weight"
    values = [
        (layer.format(10, "experts.0.w1"), (4, 2), 0.2),
        (layer.format(10, "experts.1.w1"), (4, 2), 0.6),
        (layer.format(10, "experts.2.w1"), (4, 4), 1.0),
        (layer.format(9, "experts.0.w1"), (4, 2), 0.5),
        (layer.format(9, "gate"), None, 0.25),
        (layer.format(9, "norm"), (4,), 0.9),
        ("model.embed_tokens.weight", (8, 2), 0.7),
    ]
    found = layer_heatmap("code", "density", values)
    assert (found.layers, found.components) == (("9", "10"), ("w1", "gate"))
    assert found.cells[0] == (0.5, 0.25)
    assert found.cells[1] == (pytest.approx((0.2 * 8 + 0.6 * 8 + 1.0 * 16) / 32), None)
    assert layer_heatmap("code", "density", values[-1:]) is None


def test_names_are_as_long_as_they_must_be():
    names = ["h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight", "h.0.mlp.c_fc.weight"]
    found = layer_heatmap("code", "density", [(name, (2, 2), 0.5) for name in names])
    assert found.components == ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")


def test_models_with_hash_and_license(models):
    base, code, _ = model_records(planned(models, recipe(models)))
    assert (base.name, base.role, base.license) == ("base", "base", "apache-2.0")
    assert (code.role, code.license) == ("expert", "") and code.fingerprint.startswith("content ")


def test_the_page_of_a_merged_folder(models):
    done = planned(models, recipe(models))
    page = merge_page(done, Run(commands=("python3 utils/merger.py --merge_config mine.yaml",), seconds=1.5))
    assert page.verdict.sentence == "merged is a merge of code, math into base by ties."
    assert page.verdict.outcome is None and len(page.run.models) == 3 and page.run.seconds == 1.5
    html = render(page)
    assert "down_proj" in html and "apache-2.0" in html and str(models) not in html
    assert render(dataclasses.replace(page, run=None)) != html
