"""Command 3 with --report and --evaluation: the card and the page of a merged folder."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.commands_here import done_here, refused_here
from tests.reports.document import Element, read
from tests.tiny_evaluations import write_scores
from tests.tiny_merges import recipe, write_recipe


@pytest.fixture
def copies(copies, tmp_path) -> Path:
    """With a license, a recipe and an evaluation."""
    (copies / "math" / "README.md").write_text("---\nlicense: mit\n---\n")
    write_recipe(tmp_path / "ours.yaml", recipe(tmp_path))
    (tmp_path / "evaluation").mkdir()
    write_scores(tmp_path / "evaluation")
    return tmp_path


def sections(document) -> list[str]:
    """The page's sections by their ids; warnings (the models here are no fine-tunes) have none."""
    found = document.one("main").all("section")
    return [section.attributes["id"] for section in found if "id" in section.attributes]


def test_card_and_page_hold_the_figures_and_the_licenses(copies):
    words = ["--output_path", copies / "merged", "--merge_config", copies / "ours.yaml", "--device", "cpu"]
    done_here("utils/merger.py", *words, "--report", "--evaluation", copies / "evaluation", cwd=copies)
    card = (copies / "merged" / "README.md").read_text()
    ModelCard(card)  # the hub's client reads it
    assert re.search(r"## Evaluation\n\n\| model \| role \| math, loss", card) and "**ours**" in card
    assert re.search(r"\| math \| expert \| content \w{16} \| mit \|", card) and "| not stated |" in card
    document = read((copies / "merged" / "report.html").read_text())
    assert sections(document) == [
        "tasks", "overall", "forgetting", "recipe", "run",
    ]  # fmt: skip
    assert "ours is better than plain" in document.one("header").text
    assert "report.html" in json.loads((copies / "merged" / "manifest.json").read_text())["files"]
    for path in (copies / "merged").iterdir():
        assert os.fsencode(copies) not in path.read_bytes(), path.name


def merged_page(folder: Path, name: str, **manifest) -> Element:
    """The page of a merge by the evaluated recipe `name`, with this in the evaluation's manifest."""
    (folder / "evaluation/manifest.json").write_text(json.dumps(manifest))
    (folder / "ours.yaml").rename(folder / f"{name}.yaml")
    words = ["--output_path", "merged", "--merge_config", f"{name}.yaml", "--device", "cpu"]
    done_here("utils/merger.py", *words, "--report", "--evaluation", "evaluation", cwd=folder)
    return read((folder / "merged/report.html").read_text())


def test_a_reference_is_called_what_the_evaluation_called_it_and_the_winner_is_its_winner(copies):
    document = merged_page(copies, "ours", best_on_validation="plain", reference_is="the best uniform merge")
    head = document.one("header").text
    assert "ours is better than plain, the best uniform merge" in head
    assert "The best on validation rows was plain." in head
    rows = [row.text for row in document.all("tr") if row.attributes.get("class") == "winner"]
    assert rows and all("plain" in row for row in rows)
    assert any("merged here" in row.text for row in document.all("tr"))


def test_a_reference_that_is_merged_is_not_said_to_be_the_best(copies):
    head = merged_page(copies, "plain", best_on_validation="ours").one("header").text
    assert "Nothing is better" not in head and "plain is the reference: it keeps 40.0%" in head
    assert "The best on validation rows was ours." in head


def test_a_page_without_figures_says_so(copies):
    words = ["--output_path", "merged", "--merge_config", "ours.yaml", "--device", "cpu"]
    done_here("utils/merger.py", *words, "--report", cwd=copies)
    document = read((copies / "merged" / "report.html").read_text())
    assert sections(document) == ["recipe", "run"]
    assert "takes an evaluation" in document.one("header").text


def test_an_evaluation_of_another_recipe_is_refused_before_anything_is_read(copies):
    data = yaml.safe_load((copies / "ours.yaml").read_text())
    write_recipe(copies / "theirs.yaml", data)
    words = ["--output_path", "merged", "--merge_config", "theirs.yaml", "--evaluation", "evaluation"]
    refused_here("evaluation-other-recipe", "utils/merger.py", *words, cwd=copies)
