"""The page as a whole: its sections, its order, that it needs nothing else, and that it survives any text and number."""

import dataclasses
import itertools
import math
import re

import pytest

from tests.reports.document import read
from tests.reports.pages import full_page
from utils.reports.page import render
from utils.reports.values import (
    Answer,
    Contender,
    Estimate,
    Front,
    FrontPoint,
    Heatmap,
    History,
    Page,
    Recipe,
    Role,
    Run,
    Sample,
    Score,
    Standing,
    TaskScores,
    Trial,
    Verdict,
)

SECTIONS = ["tasks", "overall", "forgetting", "recipe", "search", "samples", "run"]
HOSTILE = '<script>alert("x")</script>&amp;\'{{ 7 * 7 }}" onload="x'


@pytest.fixture(scope="module")
def html() -> str:
    return render(full_page())


@pytest.fixture(scope="module")
def document(html):
    return read(html)


def test_the_verdict_comes_first_and_the_sections_follow_in_order(document):
    assert [section.attributes.get("id") for section in document.one("main").all("section")][1:] == SECTIONS
    body = document.one("body").text
    assert body.index(full_page().verdict.sentence) < body.index("Each task")
    assert [link.attributes["href"] for link in document.one("nav").all("a")] == [f"#{name}" for name in SECTIONS]


def test_landmarks_headings_and_names(document):
    assert document.one("head").one("title").text == document.one("h1").text
    for tag in ("header", "nav", "main", "footer"):
        assert document.one(tag) is not None
    levels = [int(each.tag[1]) for each in document.all() if re.fullmatch(r"h[1-6]", each.tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    names = [each.attributes["id"] for each in document.all() if "id" in each.attributes]
    assert len(names) == len(set(names))
    pointed = [each.attributes.get("aria-labelledby") for each in document.all()]
    assert {name for value in pointed if value for name in value.split()} <= set(names)
    assert document.one("html").attributes["lang"] == "en"


def test_tables_are_read_aloud(document):
    for table in document.all("table"):
        assert table.one("caption").text
        heads = table.one("thead").all("th")
        assert all(head.attributes["scope"] == "col" for head in heads)
        for row in table.one("tbody").all("tr"):
            cells = [cell for cell in row.children if cell.tag in ("th", "td")]
            assert len(cells) == len(heads) and cells[0].tag == "th" and cells[0].attributes["scope"] == "row"


def test_pictures_have_a_name_and_a_description_and_their_numbers_below(document):
    pictures = document.all("svg", "picture")
    assert len(pictures) >= 5
    for picture in pictures:
        assert picture.attributes["role"] == "img"
        assert picture.all("title")[0].text and picture.one("desc").text
    assert all(figure.one("details").one("table") for figure in document.all("figure"))


def test_everything_that_scrolls_is_reached_by_keyboard(document):
    scrolling = document.all("div", "scroll") + document.all("pre", "scroll") + document.all("pre", "prompt")
    assert scrolling
    for each in scrolling:
        assert each.attributes["tabindex"] == "0" and each.attributes["aria-label"]


def self_contained(html: str) -> None:
    document = read(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {each.tag for each in document.all()}
    for each in document.all():
        for name, value in each.attributes.items():
            if name in ("src", "srcset", "action", "data", "poster", "style", "xlink:href"):
                raise AssertionError(f"{each.tag} {name}={value}")
            if name == "href":
                assert value.startswith("#"), value
            assert not name.startswith("on"), name
    style = document.one("style").text
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_nothing_is_fetched(html):
    self_contained(html)
    assert "default-src 'none'" in html


def test_every_shape_that_is_used_is_there(document):
    shapes = {path.attributes["id"] for path in document.all("path")}
    assert {use.attributes["href"] for use in document.all("use")} <= {f"#{name}" for name in shapes}


def test_a_large_search_stays_below_three_megabytes():
    html = render(full_page(candidates=64, tasks=4, trials=200, layers=80))
    assert len(html.encode()) < 3e6
    self_contained(html)
    assert len(read(html).all("tr", "winner")) == 4 + 2  # once in every table of contenders


def test_what_is_larger_than_any_page_is_cut_and_said():
    cells = tuple(tuple(0.5 for _ in range(1800)) for _ in range(300))
    names = tuple(f"experts.{index}.down_proj" for index in range(1800))
    heatmap = Heatmap("moe", "density", tuple(map(str, range(300))), names, cells)
    page = dataclasses.replace(
        full_page(),
        recipe=Recipe(heatmaps=(heatmap,) * 9),
        history=History("gain", tuple(Trial(index, index / 4000, what="x" * 40) for index in range(4000))),
        samples=tuple(Sample("p" * 10**6, (Answer("base", "a" * 10**6),)) for _ in range(20)),
    )
    html = render(page)
    assert len(html.encode()) < 3e6
    text = read(html).text
    assert "first 256 of 300 layers and 64 of 1800 components" in text
    assert "3 more heatmaps are left out" in text and "3700 more are in the files" in text and "more characters" in text


def test_names_and_texts_are_escaped():
    contender = Contender(HOSTILE, Role.CANDIDATE, HOSTILE)
    base = Contender("base", Role.BASE)
    page = Page(
        title=HOSTILE,
        verdict=Verdict(HOSTILE, None, (HOSTILE,)),
        contenders=(base, contender),
        reference=HOSTILE,
        winner=HOSTILE,
        tasks=(TaskScores(HOSTILE, HOSTILE, True, (Score(HOSTILE, Estimate(1.0)), Score("base", Estimate(2.0)))),),
        standings=(Standing(HOSTILE, Estimate(0.5), worst=0.1, worst_task=HOSTILE, forgetting=Estimate(0.1)),),
        recipe=Recipe(((HOSTILE, HOSTILE),), (Heatmap(HOSTILE, HOSTILE, (HOSTILE,), (HOSTILE,), ((0.5,),)),), HOSTILE),
        history=History(HOSTILE, (Trial(0, 0.5, what=HOSTILE),), reference=0.1, reference_name=HOSTILE),
        fronts=(Front(HOSTILE, HOSTILE, (FrontPoint(HOSTILE, 0.1, 0.2, True, label=HOSTILE),)),),
        samples=(Sample(HOSTILE, (Answer(HOSTILE, HOSTILE),), HOSTILE, HOSTILE),),
        run=Run((HOSTILE,), {HOSTILE: HOSTILE}, facts=((HOSTILE, HOSTILE),)),
        notes=(HOSTILE,),
        warnings=(HOSTILE,),
        next_command=HOSTILE,
    )
    html = render(page)
    self_contained(html)
    text = read(html).text
    assert text.count(HOSTILE) > 20 and "49" not in text


def test_a_page_with_a_title_alone():
    document = read(render(Page("nothing yet")))
    assert document.one("h1").text == "nothing yet"
    assert not document.all("section") and not document.all("nav") and not document.all("table")


@pytest.mark.parametrize("missing", [*SECTIONS, "verdict", "warnings", "notes"])
def test_what_has_no_data_is_left_out(missing):
    without = {
        "tasks": {"tasks": ()},
        "overall": {"standings": ()},
        "forgetting": {"standings": tuple(dataclasses.replace(one, forgetting=None) for one in full_page().standings)},
        "search": {"history": None, "importance": None, "fronts": ()},
        "verdict": {"verdict": None},
        "recipe": {"recipe": Recipe()},
        "run": {"run": Run()},
    }
    page = dataclasses.replace(full_page(), **without.get(missing, {missing: ()}))
    document = read(render(page))
    present = [section.attributes.get("id") for section in document.all("section") if "id" in section.attributes]
    gone = {missing, "forgetting"} if missing == "overall" else {missing}
    assert present == [name for name in SECTIONS if name not in gone]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 0.0, 1e300, -1e-300])
def test_any_number_is_shown(value):
    contenders = (Contender("base", Role.BASE), Contender("ours", Role.CANDIDATE))
    bad = Estimate(value, value, value)
    scores = (Score("base", bad, bad, value, value, value), Score("ours", Estimate(1.0), bad))
    page = Page(
        "numbers",
        contenders=contenders,
        reference="base",
        winner="ours",
        tasks=(TaskScores("t", "loss", False, scores), TaskScores("u", "accuracy", True, scores, percent=True)),
        standings=(Standing("base", bad, bad, value, value, "t", bad), Standing("ours", bad)),
        recipe=Recipe(heatmaps=(Heatmap("x", "density", ("0",), ("q",), ((value,),)),)),
        history=History("gain", (Trial(0, value), Trial(1, 0.5)), reference=value),
        fronts=(Front("a", "b", (FrontPoint("ours", value, 0.5, True), FrontPoint("base", 0.1, 0.2))),),
        run=Run(seconds=value),
    )
    html = render(page)
    self_contained(html)
    assert not re.search(r"\bnan\b|\binf\b|None", read(html).text.replace("nan_", ""))
    for use in read(html).all("use"):
        assert 0 <= float(use.attributes["x"].rstrip("%")) <= 100


def test_without_a_gain_to_keep_there_is_nothing_to_say_of_all_tasks():
    nothing = tuple(dataclasses.replace(one, gain=Estimate(None), forgetting=None) for one in full_page().standings)
    document = read(render(dataclasses.replace(full_page(), standings=nothing)))
    present = [section.attributes.get("id") for section in document.all("section")]
    assert "tasks" in present and not {"overall", "forgetting"} & set(present)


def test_the_same_page_is_the_same_text(html):
    assert render(full_page()) == html


def test_names_must_be_of_contenders():
    with pytest.raises(ValueError, match="'ghost'"):
        Page("x", contenders=(Contender("a", Role.BASE),), winner="ghost")
    with pytest.raises(ValueError, match="one name"):
        Page("x", contenders=(Contender("a", Role.BASE), Contender("a", Role.EXPERT)))
    with pytest.raises(ValueError, match="rows"):
        Heatmap("x", "density", ("0",), ("q", "k"), ((1.0,),))
