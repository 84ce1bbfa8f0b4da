"""The page as a browser shows it: wide and narrow, light and dark, on paper, and to those who do not see it."""

import io
import re

import pytest

from tests.reports.browser import NAMES, Browser, chromium, find_chromium
from tests.reports.pages import full_page
from utils.reports.page import render

SECTIONS = ["tasks", "overall", "forgetting", "recipe", "search", "samples", "run"]

# Text and background colors of everything that holds text, backgrounds taken from the nearest ancestor that has one.
CONTRAST = """
(() => {
  const numbers = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = rgb => { const [r, g, b] = rgb.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (element.closest('title, desc, style, .cell, .definitions')) continue;
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element);
    const text = numbers(element instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    let behind = element, ground;
    do { ground = numbers(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
    while (behind && ground.length === 4 && ground[3] === 0);
    const pair = [light(text), light(ground.slice(0, 3))].sort((a, b) => b - a);
    found.push([(pair[0] + .05) / (pair[1] + .05), element.outerHTML.slice(0, 120)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""
# What sticks out of the column of text (a mark or a label by a few pixels at most), outside of frames that scroll.
OVERFLOW = """
[...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, pre, .unseen, caption, .skip, thead')
  && element.getBoundingClientRect().right > document.querySelector('main').getBoundingClientRect().right + 12).map(element => element.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Browser:
    program = find_chromium()
    if program is None:
        pytest.skip(f"no Chromium on the path (looked for {', '.join(NAMES)})")
    with chromium(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(full_page()), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 700, 1000, 1600])
def test_everything_is_there_and_nothing_sticks_out(browser, report, width, scheme):
    browser.open(report, width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [report.as_uri()]
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.evaluate(OVERFLOW) == []
    heights = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('main > section[id]')].map(s => [s.id, s.offsetHeight]))"
    )
    assert list(heights) == SECTIONS and all(height > 60 for height in heights.values())
    contrasts = browser.evaluate(CONTRAST)
    assert len(contrasts) > 200 and contrasts[0][0] >= 4.5, contrasts[:3]


def test_complaints_are_heard(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>nothing.there()</script><img src='missing.png'>")
    browser.open(page, 400)
    assert "not defined" in " ".join(browser.complaints()) and len(browser.requests()) == 2


@pytest.mark.parametrize("width", [400, 1600])
def test_screenshots_show_something(browser, report, width):
    from PIL import Image

    browser.open(report, width)
    image = Image.open(io.BytesIO(browser.screenshot()))
    assert image.width == width and image.height > 2000
    colors = image.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colors) > 200 and max(count for count, _ in colors) < 0.99 * image.width * image.height


@pytest.mark.parametrize("width", [400, 1600])
def test_marks_are_level_with_the_ticks_above(browser, report, width):
    """The axis and the strips below it are as wide as each other, so that a mark stands below its number."""
    browser.open(report, width)
    widths = browser.evaluate(
        "[...document.querySelectorAll('table.scores')].filter(t => t.querySelector('.axis') && t.offsetWidth).map(t =>"
        " ['.axis', 'svg.strip'].map(s => { const r = t.querySelector(s).getBoundingClientRect(); return [r.x, r.width] }))"
    )
    assert len(widths) >= 4
    for axis, strip in widths:
        assert axis == pytest.approx(strip, abs=8 if width == 400 else 0.5)


@pytest.mark.parametrize("width", [400, 1600])
def test_landmarks_and_tables_are_announced(browser, report, width):
    browser.open(report, width)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert roles.count(role) == 1, role
    rows = sum(len(task.scores) for task in full_page().tasks) + 2 * len(full_page().standings)
    assert roles.count("rowheader") >= rows and roles.count("table") >= 5
    named = [node["name"]["value"] for node in nodes if node["role"]["value"] in ("img", "image", "graphics-document")]
    assert len(named) >= 5 and all(named)


def test_focus_is_seen_and_moves_in_order(browser, report):
    browser.open(report, 1600)
    reached = []
    for _ in range(9):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        reached.append(browser.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
        assert outline == "solid"
    assert reached[0] == "Skip to the content" and reached[2:] == [
        "Each task", "All tasks together", "Forgetting", "The recipe", "The search", "Answers to held-out ", "What was run",
    ]  # fmt: skip


def test_it_prints_on_a4(browser, report):
    browser.open(report, 1600)
    pdf = browser.pdf()
    boxes = re.findall(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)", pdf)
    assert 3 <= len(boxes) <= 14
    for width, height in boxes:
        assert float(width) == pytest.approx(595.3, abs=1) and float(height) == pytest.approx(841.9, abs=1)
