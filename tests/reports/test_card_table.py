"""The table and the metadata of a model card, read back by the hub's own client."""

import dataclasses
import math
import re

import yaml
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results

from tests.reports.pages import full_page
from utils.reports.card_table import evaluation_section, inputs_section, model_index
from utils.reports.values import Contender, Estimate, HubDataset, ModelRecord, Page, Role, Score, TaskScores

MERGED = "guided_mean power 0.00"


def cells(markdown: str) -> list[list[str]]:
    """The rows of the first table, split at bars that are not escaped."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_table_holds_base_experts_controls_and_the_merge():
    page = full_page()
    head, rule, *rows = cells(evaluation_section(page, MERGED))
    assert all(len(row) == len(head) == len(rule) for row in rows)
    others = [one.name for one in page.contenders if one.role is not Role.CANDIDATE]
    assert [row[0].replace("\\", "") for row in rows] == [*others, f"**{MERGED}**"]
    score = next(one for one in page.tasks[0].scores if one.contender == MERGED)
    ours = dict(zip(head, rows[-1], strict=True))
    assert ours["math, loss"] == f"{score.value.value:.3f}" and ours["math, gain kept"] == f"{100 * score.gain:.1f}%"
    assert ours["against task arithmetic 0.4"].endswith("better")


def test_without_a_gain_to_keep_no_column_speaks_of_it():
    page = full_page()
    nothing = tuple(dataclasses.replace(one, gain=Estimate(None)) for one in page.standings)
    head, *rows = cells(evaluation_section(dataclasses.replace(page, standings=nothing), MERGED))
    assert "mean gain kept" not in head and {len(row) for row in rows} == {len(head)}


def test_what_the_numbers_are_stands_below():
    text = evaluation_section(full_page(), MERGED)
    assert "- math: loss, nats per token, 400 rows, lower is better." in text
    assert "other text of the same kind" in text


def test_nothing_scored_gives_no_table():
    assert evaluation_section(Page("x"), "ours") == "" and inputs_section(()) == ""
    assert model_index(Page("x"), "ours", "merged") == []


def test_names_cannot_break_the_table():
    name = "a|b\n`c` <b>*d*</b> [e](http://f)"
    page = Page(
        "x",
        contenders=(Contender(name, Role.CANDIDATE),),
        tasks=(TaskScores(name, "loss", False, (Score(name, Estimate(math.nan)),)),),
    )
    head, rule, row = cells(evaluation_section(page, name))
    assert len(head) == len(rule) == len(row) == 3
    assert not re.search(r"(?<!\\)[<`\[]", evaluation_section(page, name))


def test_licenses_of_the_inputs():
    text = inputs_section((ModelRecord("org/a", "base", "abc", "apache-2.0"), ModelRecord("org/b", "expert")))
    _, _, first, second = cells(text)
    assert first == ["org/a", "base", "abc", "apache-2.0"] and second[3] == "not stated"


def test_the_hub_reads_the_metadata():
    page = full_page()
    scored = dataclasses.replace(
        page.tasks[0],
        measure="exact match",
        metric="exact_match",
        dataset=HubDataset("openai/gsm8k", "test", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee"),
    )
    page = dataclasses.replace(page, tasks=(scored, page.tasks[1]))
    index = model_index(page, MERGED, "my-merge")
    name, results = model_index_to_eval_results(yaml.safe_load(yaml.safe_dump(index)))
    assert name == "my-merge" and {one.metric_type for one in results} == {"exact_match", "perplexity"}
    assert {(one.dataset_type, one.dataset_config, one.dataset_split) for one in results} == {
        ("openai/gsm8k", "main", "test")
    }
    value = next(one.value.value for one in scored.scores if one.contender == MERGED)
    assert [one.metric_value for one in results if one.metric_type == "exact_match"] == [value]
    # what the client makes of these results is what was given
    assert ModelCardData(model_name=name, eval_results=results).to_dict()["model-index"] == index


def test_metadata_holds_only_what_the_hub_has_names_for():
    page = full_page()
    assert model_index(page, MERGED, "m") == []  # rows of local files
    nan = Score(MERGED, Estimate(math.nan), perplexity=math.inf)
    task = dataclasses.replace(page.tasks[0], scores=(nan,), metric="accuracy", dataset=HubDataset("openai/gsm8k"))
    assert model_index(dataclasses.replace(page, tasks=(task,)), MERGED, "m") == []
