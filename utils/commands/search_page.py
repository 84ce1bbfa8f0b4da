"""A search as the plain values that `utils/reports` shows: its history, what mattered, the front, the winner's recipe."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from utils.commands.evaluate_page import estimate, model_types
from utils.commands.evaluated import Evaluated
from utils.commands.evaluation_folder import GAIN_OF
from utils.commands.report_recipe import planned_recipe
from utils.commands.search_options import BEST
from utils.commands.search_setup import Prepared
from utils.evaluation.candidates import Candidate
from utils.merging.planning import plan_recipe
from utils.reports.values import Front, FrontPoint, History, Importance, Page, Recipe, Role, Trial, TrialState
from utils.reports.values import Verdict as PageVerdict
from utils.reports.verdict import judge
from utils.searching.points import Point
from utils.searching.study import Finished
from utils.searching.winners import Winners


def add_search(
    page: Page,
    ready: Prepared,
    evaluated: Evaluated,
    winners: Winners,
    names: Mapping[str, str],
    recipes: Mapping[str, bytes | Path],
) -> Page:
    """The page with all that a search adds to an evaluation; `recipes` are the files that it writes, by name."""
    importance = ready.study.importances()
    said = {names[one.digest]: one.point.sentence() for one in winners.all if not one.known}
    run = page.run and dataclasses.replace(
        page.run,
        seeds=(*page.run.seeds, ("search", ready.options.seed)),
        facts=(*page.run.facts, ("sampler", ready.study.sampler), ("trials", str(len(ready.study.trials)))),
    )
    return dataclasses.replace(
        page,
        verdict=_verdict(page, ready, evaluated, winners, names),
        contenders=tuple(dataclasses.replace(one, note=said.get(one.name, one.note)) for one in page.contenders),
        recipe=_recipe(ready, winners, recipes),
        history=_history(ready, winners, names),
        importance=Importance("PED-ANOVA, all trials with a value", tuple(importance.items())) if importance else None,
        fronts=_fronts(ready, winners, names),
        run=run,
    )


def _by_objective(page: Page, ready: Prepared, evaluated: Evaluated) -> PageVerdict:
    """The verdict on the figure that the search made as large as it could, where that is not the mean."""
    standings = []
    for one in page.standings:
        figures = evaluated.figures[one.contender]
        difference = figures.chosen_by_difference
        standings.append(
            dataclasses.replace(
                one,
                gain=estimate(figures.chosen_by),
                difference=estimate(difference) if difference else None,
                p=difference.p if difference else None,
            )
        )
    gain = GAIN_OF[ready.options.objective]
    return judge(evaluated.winner, evaluated.reference or "", standings, evaluated.reference_is, gain=gain)


def _verdict(
    page: Page, ready: Prepared, evaluated: Evaluated, winners: Winners, names: Mapping[str, str]
) -> PageVerdict | None:
    """The evaluator's verdict by the search's objective, and whether the winner is ahead of every uniform merge, the
    nearest one named."""
    if page.verdict is None or evaluated.winner is None:
        return None
    of_gain = {name: (one.chosen_by or one.gain).value for name, one in evaluated.figures.items()}
    if evaluated.by_objective:
        page = dataclasses.replace(page, verdict=_by_objective(page, ready, evaluated))
    if winners.best.point.uniform:
        if winners.other is None:
            return page.verdict
        other = names[winners.other.digest]
        said = f"The best other recipe on validation rows is {other}"
        figures = evaluated.figures[other]
        difference = figures.chosen_by_difference or figures.difference
        if difference is not None and math.isfinite(difference.value):
            value, low, high = (100 * one for one in (difference.value, difference.low, difference.high))
            said += f", on test rows {value:+.1f} points from it (95% interval {low:+.1f} to {high:+.1f})"
        said += "."
        return dataclasses.replace(page.verdict, details=(said, *page.verdict.details))
    own = of_gain[names[winners.best.digest]]
    others = {names[one.digest]: of_gain[names[one.digest]] for one in winners.uniform}
    if len(others) < 2 or not all(map(math.isfinite, (own, *others.values()))):
        return page.verdict
    nearest = max(others, key=lambda name: others[name])
    ahead = 100 * (own - others[nearest])
    each = "each" if ahead > 0 else "not each"
    said = f"On test rows it keeps more than {each} of the {len(others)} uniform merges that validation rows did not rule out"
    if nearest != page.reference:
        said += f"; the nearest is {nearest}, {abs(ahead):.1f} points {'behind' if ahead > 0 else 'ahead'}"
    return dataclasses.replace(page.verdict, details=(f"{said}.", *page.verdict.details))


def _recipe(ready: Prepared, winners: Winners, recipes: Mapping[str, bytes | Path]) -> Recipe:
    """The winner as the merge would plan it, tensor by tensor, what the search set, and the file that it writes."""
    point, made = winners.best.point, ready.maker.make(winners.best.point)
    planned = plan_recipe(
        ready.scorer.settings.merge, Candidate("best", recipe=made.data).merge_recipe(), lambda line: None
    )
    written: dict[Path, str] = {}
    for name, content in recipes.items():  # the best one's first
        if isinstance(content, Path):
            written.setdefault(content.resolve(), name)
    recipe = planned_recipe(planned, model_types(ready.scorer), written)
    facts = [("guidance", point.guidance)]
    facts += [(name, f"{value:.4g}") for name, value in point.numbers.items() if value is not None]
    facts += [(name, str(value)) for name, value in point.options.items()]
    facts += [(f"factor of {name}", f"{value:.4g}") for name, value in point.weights.items()]
    facts += [(f"factor of depth {place + 1} of {len(point.depth)}", f"{v:.4g}") for place, v in enumerate(point.depth)]
    facts.append(("runs in", "any mergekit" if made.stock else "this project's utils/merger.py"))
    own = {name for name, _ in facts}
    return Recipe(
        (*facts, *(fact for fact in recipe.facts if fact[0] not in own)), recipe.heatmaps, recipes[BEST].decode()
    )


def _history(ready: Prepared, winners: Winners, names: Mapping[str, str]) -> History:
    """All trials, by the objective's figure on validation rows."""
    objective, trials = ready.objective, []
    for place, trial in enumerate(ready.study.trials):
        own = trial.user_attrs
        gains = own.get("gains")
        value = float(objective.figure(np.array([gains[task] for task in objective.tasks]))) if gains else None
        seen, there = own.get("rows", (0, 0))
        state = TrialState.FAILED if gains is None else TrialState.COMPLETE if seen == there else TrialState.PRUNED
        what = own.get("known") or (Point.read(own["point"]).sentence() if "point" in own else "")
        trials.append(Trial(place, value, state, what, seen, "known" in own))
    uniform = winners.uniform[0] if winners.uniform else None
    return History(
        objective=f"{ready.options.figure}, validation rows",
        trials=tuple(trials),
        percent=True,
        reference=float(objective.figure(np.array(list(uniform.gains.values())))) if uniform else None,
        reference_name=names[uniform.digest] if uniform else "",
    )


def _fronts(ready: Prepared, winners: Winners, names: Mapping[str, str]) -> tuple[Front, ...]:
    """What every two tasks cost each other, all trials with a value; the front itself where it was asked for."""
    best = {one.digest for one in (winners.front or (winners.best,))}
    return tuple(
        Front(first, second, tuple(_front_point(one, first, second, best, names) for one in ready.study.finished()))
        for first, second in itertools.combinations(ready.objective.tasks, 2)
    )


def _front_point(one: Finished, first: str, second: str, best: Collection[str], names: Mapping[str, str]) -> FrontPoint:
    leads = one.digest in best
    role = Role.CONTROL if one.point.uniform else Role.CANDIDATE
    label = names.get(one.digest, "") if leads else ""
    return FrontPoint(one.known or f"trial {one.number}", one.gains[first], one.gains[second], leads, role, label)
