"""The pictures of a search: its trials in order with the best so far, and what two tasks cost each other."""

import itertools
from collections.abc import Sequence

from markupsafe import Markup

from utils.reports import svg
from utils.reports.frame import BOTTOM, HEIGHT, RIGHT, Frame, across, up
from utils.reports.values import Front, FrontPoint, History, Role, Trial, TrialState, is_known

_LONGEST_LABEL = 32


def draw_history(history: History, name: str) -> Markup:
    """Every trial's value, the best so far as a stepped line, and the reference as a dashed one."""
    best = best_so_far(history)
    values = [trial.value for trial in history.trials]
    ordered = sorted(value for value in values if is_known(value))
    keep = [history.reference, *(value for _, value in best[-1:]), *ordered[len(ordered) // 2 :][:1]]
    numbers = [float(trial.number) for trial in history.trials]
    upright = up([*values, history.reference], keep)
    frame = Frame(across(numbers), upright, "trial", history.objective, y_percent=history.percent, x_whole=True)
    parts = frame.draw()
    if is_known(history.reference):
        y = frame.up.place(history.reference)
        parts.append(svg.line(frame.across.start, y, RIGHT, y, "guide reference"))
    parts += _steps([frame.at(*each) for each in best], RIGHT)
    parts += [_trial_mark(frame, trial) for trial in history.trials]
    said = f"{len(history.trials)} trials; {history.objective}"
    if best:
        said += f"; the best is trial {best[-1][0]}"
    return svg.picture(parts, HEIGHT, "Search history", said, name)


def best_so_far(history: History) -> list[tuple[int, float]]:
    """The trials that were better than all before them, as (number, value); only complete ones count."""
    found: list[tuple[int, float]] = []
    for trial in history.trials:
        if trial.state is not TrialState.COMPLETE or not is_known(trial.value):
            continue
        ahead = trial.value - found[-1][1] if found else 0.0
        if not found or (ahead > 0 if history.higher_is_better else ahead < 0):
            found.append((trial.number, trial.value))
    return found


def draw_front(front: Front, name: str) -> Markup:
    """The points between two tasks; those that none beats on both are filled and joined by a stepped line."""
    known = [point for point in front.points if is_known(point.x) and is_known(point.y)]
    edge = front.unbeaten
    keep = [*edge, *(point for point in known if point.chosen or point.label)]
    x_name, y_name = (f"gain kept on {task}" if front.percent else task for task in (front.x_name, front.y_name))
    frame = Frame(
        across([point.x for point in known], [point.x for point in keep]),
        up([point.y for point in known], [point.y for point in keep]),
        x_name,
        y_name,
        front.percent,
        front.percent,
    )
    parts = frame.draw() + (frame.zeros() if front.percent else [])
    parts += _staircase([frame.at(point.x, point.y) for point in edge], falls_late=front.higher_is_better)
    for point in sorted(known, key=lambda each: bool(each.label) + each.chosen):  # what matters is drawn last
        parts += _point_marks(frame, point, filled=point in edge)
    said = f"{x_name} against {y_name}: {len(known)} points, {len(edge)} of them not beaten on both"
    return svg.picture(parts, HEIGHT, f"{x_name} and {y_name}", said, name)


def _steps(places: Sequence[tuple[float, float]], end: float) -> list[Markup]:
    """The best so far: level up to the next better one, then upright."""
    parts = []
    for index, (x, y) in enumerate(places):
        following = places[index + 1] if index + 1 < len(places) else None
        until = following[0] if following else end
        parts.append(svg.line(x, y, until, y, "best"))
        if following:
            parts.append(svg.line(until, y, until, following[1], "best"))
    return parts


def _staircase(places: Sequence[tuple[float, float]], falls_late: bool) -> list[Markup]:
    """The edge of what is reached: a corner between two neighbors is a pair of values that both of them reach."""
    parts = []
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        corner = (x1, y2) if falls_late else (x2, y1)
        parts.append(svg.line(x1, y1, *corner, "front"))
        parts.append(svg.line(*corner, x2, y2, "front"))
    return parts


def _trial_mark(frame: Frame, trial: Trial) -> Markup:
    x = frame.across.place(trial.number)
    if trial.state is TrialState.FAILED or not is_known(trial.value):
        return svg.mark("failed", x, BOTTOM - 7, "failed")
    y, arrow = frame.up.place(trial.value), frame.beyond(trial.number, trial.value)
    if trial.state is TrialState.PRUNED:
        return svg.mark(arrow or "pruned", x, y, "pruned")
    shape, style = ("control", "control") if trial.known else ("candidate", "candidate small")
    return svg.mark(arrow or shape, x, y, style)


def _point_marks(frame: Frame, point: FrontPoint, filled: bool) -> list[Markup]:
    x, y = frame.at(point.x, point.y)
    hollow = point.role is Role.CANDIDATE and not filled
    shape = frame.beyond(point.x, point.y) or ("pruned" if hollow else point.role)
    parts = [svg.mark(shape, x, y, "pruned" if hollow else point.role)]
    if point.chosen:
        parts.append(svg.mark("chosen", x, y))
    if point.label:
        anchor, shift = ("end", -1.5) if x > 60 else ("start", 1.5)
        words = point.label if len(point.label) <= _LONGEST_LABEL else point.label[: _LONGEST_LABEL - 1] + "…"
        parts.append(svg.text(x + shift, y - 9, words, anchor, "on-line"))
    return parts
