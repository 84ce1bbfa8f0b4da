"""An evaluation read back from its files, as a model card needs it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.refusals import refused
from tests.tiny_evaluations import SCORE_COLUMNS, write_scores
from utils.commands.evaluation_folder import read_evaluation
from utils.publishing.manifest import file_sha256
from utils.reports.card_table import evaluation_section, model_index
from utils.reports.page import render
from utils.reports.values import Estimate, Role
from utils.reports.verdict import judge


@pytest.fixture
def folder(tmp_path) -> Path:
    write_scores(tmp_path)
    manifest = {"best_on_validation": "ours", "tasks": [{"name": "math", "rows": {"test": [3, 5, 8]}}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_everything_in_the_files_is_read(folder):
    page = read_evaluation(folder).page
    assert [(one.name, one.role) for one in page.contenders] == [
        ("base", Role.BASE), ("plain", Role.CONTROL), ("ours", Role.CANDIDATE),
    ]  # fmt: skip
    assert (page.reference, page.winner) == ("plain", "ours")
    math, gsm8k = page.tasks
    assert (math.name, math.rows, math.higher_is_better) == ("math", 3, False)
    assert (gsm8k.name, gsm8k.measure, gsm8k.higher_is_better) == ("gsm8k", "exact_match", True)
    base, plain, ours = math.scores
    assert base.perplexity == 12.2 and plain.difference is None and plain.perplexity is None
    assert ours.difference == Estimate(-0.1, -0.15, -0.05) and (ours.p, ours.gain) == (0.002, 0.53)
    standing = page.standings[2]
    assert (standing.worst, standing.worst_task, standing.p) == (0.53, "math", 0.004)
    assert standing.forgetting == Estimate(0.02, 0.01, 0.03)
    assert "0.53" not in render(page) and "53.0%" in render(page)


def record(folder: Path, **more) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | more))


def test_the_card_of_a_merge_by_an_evaluated_recipe(folder):
    found = read_evaluation(folder)
    text = evaluation_section(found.page, found.candidate_of(Path("recipes/ours.yaml"), "aa"))
    assert "**ours**" in text and "+13.0 points (+10.0 to +16.0) better" in text


def test_figures_of_lm_eval_have_their_own_direction_and_unit(folder):
    record(folder, lm_eval=[{"task": "gsm8k", "measure": "exact_match", "higher_is_better": False, "share": True}])
    _, gsm8k = read_evaluation(folder).page.tasks
    assert (gsm8k.higher_is_better, gsm8k.percent) == (False, True)


def test_a_recipe_is_known_by_its_content(folder):
    record(folder, candidates=[{"name": "base"}, {"name": "ours", "recipe_sha256": "aa"}])
    found = read_evaluation(folder)
    assert found.candidate_of(Path("renamed.yaml"), "aa") == "ours"
    for path in ("ours.yaml", "theirs.yaml"):
        with refused("evaluation-other-recipe"):
            found.candidate_of(Path(path), "bb")


def test_the_recipes_that_a_search_wrote(folder):
    written = [{"name": "ours", "recipe_sha256": "aa"}, {"name": "plain", "recipe_sha256": "bb"}]
    record(folder, candidates=written, reference_is="the best uniform merge")
    found = read_evaluation(folder)
    assert found.candidate_of(Path("best_stock.yaml"), "aa") == "ours"
    assert found.candidate_of(Path("best_uniform.yaml"), "bb") == "plain"
    assert found.reference_is == "the best uniform merge"


def test_a_search_by_another_figure_than_the_mean_is_judged_by_it(folder):
    """`ours` is ahead in the mean and behind in the task where each keeps least."""
    rows = (
        "plain,control,all tasks,objective,0.35,0.3,0.4,,,,,",
        "ours,candidate,all tasks,objective,0.2,0.1,0.3,plain,-0.15,-0.2,-0.1,0.01",
    )
    with open(folder / "scores.csv", "a") as file:
        file.write("\n".join(rows) + "\n")
    assert read_evaluation(folder).judged == read_evaluation(folder).page.standings
    record(folder, options={"objective": "worst"})
    found = read_evaluation(folder)
    assert found.page.standings[2].gain.value == 0.53 and "keeps least" in found.gain
    verdict = judge("ours", "plain", found.judged, gain=found.gain)
    assert verdict.sentence.startswith("ours is worse than plain: it keeps 20.0%")


def test_rows_of_a_data_set_of_the_hub_stand_in_the_cards_metadata(folder):
    assert model_index(read_evaluation(folder).page, "ours", "merged") == []
    rows = {"test": [3, 5, 8]}
    hub = {"id": "openai/gsm8k", "config": "main", "split": "test"}
    record(folder, tasks=[{"name": "math", "rows": rows, "hub": hub}])
    (index,) = model_index(read_evaluation(folder).page, "base", "merged")
    (result,) = index["results"]
    assert result["dataset"] == {"name": "math", "type": "openai/gsm8k", "config": "main", "split": "test"}
    (metric,) = result["metrics"]
    assert metric["type"] == "perplexity" and metric["value"] == 12.2
    card = ModelCardData(model_name="merged", eval_results=model_index_to_eval_results([index])[1], license="mit")
    assert "openai/gsm8k" in card.to_yaml()  # as the hub's own client writes it


def test_a_manifest_is_not_needed_and_scores_are(folder):
    (folder / "manifest.json").unlink()
    page = read_evaluation(folder).page
    assert page.winner == "" and page.tasks[0].rows is None
    (folder / "scores.csv").unlink()
    with refused("evaluation-not-found"):
        read_evaluation(folder)


def test_scores_that_are_not_those_of_the_manifest_are_refused(folder):
    record(folder, files={"scores.csv": file_sha256(folder / "scores.csv")})
    assert read_evaluation(folder).page.standings
    with open(folder / "scores.csv", "a") as file:
        file.write("\n")
    with refused("evaluation-edited"):
        read_evaluation(folder)


@pytest.mark.parametrize(
    "text",
    ["", "candidate,role\nours,candidate\n", ",".join(SCORE_COLUMNS) + "\nours,chef,t,loss" + ",1" * 8 + "\n",
     ",".join(SCORE_COLUMNS) + "\nours,base,t,loss,much" + ",1" * 7 + "\n"],
)  # fmt: skip
def test_what_is_no_evaluation_is_refused(folder, text):
    (folder / "scores.csv").write_text(text)
    with refused("evaluation-unreadable"):
        read_evaluation(folder)


def test_a_broken_manifest_is_refused(folder):
    (folder / "manifest.json").write_text("[1]")
    with refused("evaluation-unreadable"):
        read_evaluation(folder)
    (folder / "manifest.json").write_text("{")
    with refused("evaluation-unreadable"):
        read_evaluation(folder)
