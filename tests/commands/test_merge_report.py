"""Command 3 with --report and --evaluation: the card and the page of a merged folder."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.commands_here import done_here, refused_here
from tests.reports.document import read
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
    assert re.search(r"\| math \| expert \| headers \w{16} \| mit \|", card) and "| not stated |" in card
    document = read((copies / "merged" / "report.html").read_text())
    assert sections(document) == [
        "tasks", "overall", "forgetting", "recipe", "run",
    ]  # fmt: skip
    assert "ours is better than plain" in document.one("header").text
    assert "report.html" in json.loads((copies / "merged" / "manifest.json").read_text())["files"]
    for path in (copies / "merged").iterdir():
        assert os.fsencode(copies) not in path.read_bytes(), path.name


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
