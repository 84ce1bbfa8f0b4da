"""The report: one HTML page that holds everything it shows, readable without network and without scripts."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.reports import formats, svg
from utils.reports.heatmap import cut_heatmap, draw_color_scale, draw_heatmap, value_range
from utils.reports.lines import draw_front, draw_history
from utils.reports.plain_tables import front_table, heatmap_table, history_table, importance_table
from utils.reports.score_tables import forgetting_table, standings_table, task_table
from utils.reports.tables import Table
from utils.reports.values import Heatmap, Page, Role, Run, TrialState, is_known
from utils.runtime import gigabytes

MOST_SAMPLES = 8
_MOST_HEATMAPS = 6
_MOST_LETTERS = 4000  # of a prompt or an answer
_MOST_NUMBERS = 20_000  # of all heatmaps' tables together
_LINE = "line"  # in a legend, in the place of a shape
_SECTIONS = {
    "tasks": "Each task",
    "overall": "All tasks together",
    "forgetting": "Forgetting",
    "recipe": "The recipe",
    "search": "The search",
    "samples": "Answers to held-out prompts",
    "run": "What was run",
}


@dataclass(frozen=True)
class _Picture:
    """A picture, its heading, the table of its numbers, a sentence below it, and its legend: shape, style and words."""

    heading: str
    drawing: Markup
    table: Table | None
    note: str = ""
    legend: tuple[tuple[str, str, str], ...] = ()


def render(page: Page) -> str:
    """The whole page as HTML; everything from `page` is escaped.

    Sections without data are left out. Equal pages give equal text.
    """
    tasks = [(task, task_table(page, task)) for task in page.tasks if task.scores]
    standings = standings_table(page) if _has(page, "overall") else None
    forgetting = forgetting_table(page)
    template = _environment().get_template("page.html")
    return template.render(
        page=page,
        symbols=svg.definitions(),
        sections={name: heading for name, heading in _SECTIONS.items() if _has(page, name)},
        roles=[role for role in Role if any(each.role is role for each in page.contenders)],
        tasks=tasks,
        tested=any(is_known(score.p) for task in page.tasks for score in task.scores),
        standings=standings,
        forgetting=forgetting,
        beyond={
            "tasks": any(_reaches_beyond(table) for _, table in tasks),
            "overall": standings is not None and _reaches_beyond(standings),
            "forgetting": forgetting is not None and _reaches_beyond(forgetting),
        },
        heatmaps=_heatmaps(page),
        more_heatmaps=max(0, len(page.recipe.heatmaps) - _MOST_HEATMAPS) if page.recipe else 0,
        history=_history(page),
        importance=importance_table(page.importance) if page.importance and page.importance.shares else None,
        fronts=_fronts(page),
        samples=page.samples[:MOST_SAMPLES],
        resources=_resources(page.run) if page.run else [],
    )


def _reaches_beyond(table: Table) -> bool:
    """Whether a mark of a table lies outside its scale, so that the legend has to say what an arrow is."""
    return any("#mark-beyond" in cell for row in (*table.rows, *table.folded) for cell in row.cells)


def _has(page: Page, section: str) -> bool:
    """Whether there is anything to show under a heading."""
    recipe, run = page.recipe, page.run
    shown = {
        "tasks": any(task.scores for task in page.tasks),
        "overall": any(one.gain.known for one in page.standings),
        "forgetting": any(one.forgetting and one.forgetting.known for one in page.standings),
        "recipe": recipe and (recipe.facts or recipe.heatmaps or recipe.text),
        "search": (page.history and page.history.trials) or (page.importance and page.importance.shares) or page.fronts,
        "samples": page.samples,
        "run": run and run != Run(),
    }
    return bool(shown[section])


def _heatmaps(page: Page) -> list[tuple[str, Markup, list[_Picture]]]:
    """The heatmaps by quantity, each group with its color scale."""
    groups: dict[str, list[Heatmap]] = {}
    for heatmap in page.recipe.heatmaps[:_MOST_HEATMAPS] if page.recipe else ():
        if heatmap.layers and heatmap.components:
            groups.setdefault(heatmap.quantity, []).append(heatmap)
    numbers = sum(len(each.layers) * len(each.components) for group in groups.values() for each in group)
    drawn = []
    for number, (quantity, group) in enumerate(groups.items()):
        low, high = value_range(group)
        pictures = []
        for index, whole in enumerate(group):
            part, note = cut_heatmap(whole)
            picture = draw_heatmap(part, low, high, f"heatmap-{number}-{index}")
            table = heatmap_table(part) if numbers <= _MOST_NUMBERS else None
            pictures.append(_Picture(whole.title, picture, table, note))
        drawn.append((quantity, draw_color_scale(low, high, quantity, f"colors-{number}"), pictures))
    return drawn


def _history(page: Page) -> _Picture | None:
    history = page.history
    if not (history and history.trials):
        return None
    states = {trial.state for trial in history.trials}
    legend = [
        ("candidate", "candidate", "trial"),
        ("control", "control", "known by hand, tried first") if any(trial.known for trial in history.trials) else None,
        ("pruned", "pruned", TrialState.PRUNED) if TrialState.PRUNED in states else None,
        ("failed", "failed", TrialState.FAILED) if TrialState.FAILED in states else None,
        (_LINE, "best", "best so far"),
        (_LINE, "reference", history.reference_name or "reference") if is_known(history.reference) else None,
    ]
    drawing = draw_history(history, "history")
    shown = (*filter(None, legend), *_arrow(drawing))
    return _Picture("Trials in order", drawing, history_table(history), legend=shown)


def _arrow(drawing: Markup) -> list[tuple[str, str, str]]:
    """What an arrow is, for the legend of a picture that has one."""
    return [("beyond-down", "pruned", "beyond the scale")] if "#mark-beyond" in drawing else []


def _fronts(page: Page) -> list[_Picture]:
    pictures = []
    for index, front in enumerate(page.fronts):
        if not front.points:
            continue
        roles = {point.role for point in front.points} - {Role.CANDIDATE}
        legend = [("candidate", "candidate", "not beaten on both"), ("pruned", "pruned", "beaten")]
        legend += [(role, role, role) for role in Role if role in roles]
        if any(point.chosen for point in front.points):
            legend.append(("chosen", "chosen", "recommended"))
        heading = f"Between {front.x_name} and {front.y_name}"
        drawing = draw_front(front, f"front-{index}")
        legend += _arrow(drawing)
        pictures.append(_Picture(heading, drawing, front_table(front), legend=tuple(legend)))
    return pictures


def _resources(run: Run) -> list[tuple[str, str]]:
    """What the run took and where it ran, as far as that is known."""
    found = [
        ("device", run.device),
        ("wall time", formats.duration(run.seconds)),
        ("peak memory", "" if run.memory is None else gigabytes(run.memory)),
        ("peak disk", "" if run.disk is None else gigabytes(run.disk)),
        ("written", run.created),
        *run.facts,
    ]
    return [(label, value) for label, value in found if value]


def _shortened(text: str) -> str:
    """A prompt or an answer, its end left out where it is very long, which is said."""
    if len(text) <= _MOST_LETTERS:
        return text
    return f"{text[:_MOST_LETTERS]} … (and {formats.count(len(text) - _MOST_LETTERS)} more characters)"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": formats.count, "shortened": _shortened}
    return environment
