"""The figures of an evaluation (or a search) read back from its folder, for whoever shows them elsewhere.

found = read_evaluation(Path("output/my_pair/evaluation"))
name = found.candidate_of(recipe.path, recipe.sha256)       # whose figures a merge by this recipe has
text = evaluation_section(found.page, name)                 # utils.reports.card_table
"""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.evaluation.tasks import ALL_TASKS
from utils.merging.recipe_file import MergeRecipe
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.reports.values import Contender, Estimate, HubDataset, Page, Role, Score, Standing, TaskScores

SCORES = "scores.csv"
_LOSS, _PERPLEXITY, _GAIN, _WORST, _FORGETTING = "loss", "perplexity", "gain_kept", "worst_gain_kept", "forgetting"
_OBJECTIVE = "objective"
GAIN_OF = {  # what a search by another objective than the mean makes as large as it can
    "worst": "the gain of the task where it keeps least",
    "weighted": "the tasks' weighted gain",
}
_NOTE = (
    "Intervals are 95% intervals over rows of text, paired: they hold the noise of the text, not that of training the "
    "experts again."
)

Rows = dict[tuple[str, str, str], dict[str, str]]  # (candidate, task, measure) -> a line of scores.csv


@dataclass(frozen=True)
class Evaluation:
    """The scores in a folder as the values that a page shows, and the candidates by the SHA-256 of their recipe file.

    `reference_is` is what the page's reference is, in words; empty where its name says it. `judged` are the standings that
    a verdict goes by, with `gain` in words: those of the search's own objective, where that is not the mean.
    """

    page: Page
    recipes: Mapping[str, str]
    reference_is: str = ""
    judged: tuple[Standing, ...] = ()
    gain: str = ""

    def candidate_of(self, recipe: Path, sha256: str) -> str:
        """The candidate that a recipe file is: the one of its content; where no contents were recorded, of its name.

        Raises:
            UserError: there is none.
        """
        names = [one.name for one in self.page.contenders]
        if sha256 in self.recipes:
            return self.recipes[sha256]
        if recipe.stem in names and recipe.stem not in self.recipes.values():
            return recipe.stem
        why = "has another content than when it was evaluated" if recipe.stem in names else "was not evaluated there"
        raise UserError(
            f"{recipe} {why} (candidates of {self.page.title}: {', '.join(names)}); evaluate it, or leave --evaluation out",
            "evaluation-other-recipe",
        )


def read_evaluation(folder: Path) -> Evaluation:
    """What is in a folder; history, samples and recipe are not read.

    Raises:
        UserError: there are no scores, or they cannot be read.
    """
    path = folder / SCORES
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        if not lines:
            raise ValueError("it holds no scores")
        manifest = _manifest(folder)
        if manifest.get("files", {}).get(SCORES, digest := file_sha256(path)) != digest:
            raise UserError(
                f"{path} is not as {MANIFEST} recorded it: somebody changed it, or a run was killed between the two; put "
                "that one back, or evaluate again",
                "evaluation-edited",
            )
        rows = {(line["candidate"], line["task"], line["measure"]): line for line in lines}
        roles = {line["candidate"]: Role(line["role"]) for line in lines}
        page = _page(folder, rows, roles, manifest)
        candidates = manifest.get("candidates", [])
        recipes = {one["recipe_sha256"]: one["name"] for one in candidates if one.get("recipe_sha256")}
        objective = manifest.get("options", {}).get("objective")
        by_objective = _by_objective(page.standings, rows) if objective in GAIN_OF else ()
        judged, gain = (by_objective, GAIN_OF[objective]) if by_objective else (page.standings, "")
        return Evaluation(page, recipes, str(manifest.get("reference_is") or ""), judged, gain)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: there is no {SCORES}; give a folder that utils/evaluator.py or utils/searcher.py wrote",
            "evaluation-not-found",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as an evaluation ({type(error).__name__}: {error}); evaluate again, into another folder",
            "evaluation-unreadable",
        ) from error


@dataclass(frozen=True)
class Measured:
    """What an evaluation says of one recipe: all that it says, and which candidate the recipe is."""

    evaluation: Evaluation
    name: str

    @property
    def page(self) -> Page:
        """The evaluation's own page."""
        return self.evaluation.page


def read_measured(folder: Path | None, recipe: MergeRecipe) -> Measured | None:
    """What the evaluation in a folder says of a recipe; None without a folder.

    Raises:
        UserError: it is no evaluation, or not of this recipe.
    """
    if folder is None:
        return None
    found = read_evaluation(folder)
    return Measured(found, found.candidate_of(recipe.path, recipe.sha256))


def _page(folder: Path, rows: Rows, roles: Mapping[str, Role], manifest: Mapping[str, Any]) -> Page:
    against = next((line["against"] for line in rows.values() if line["against"]), "")
    named = manifest.get("best_on_validation")
    tested = {one["name"]: len(one["rows"]["test"]) for one in manifest.get("tasks", [])}
    hub = {one["name"]: HubDataset(**one["hub"]) for one in manifest.get("tasks", []) if one.get("hub")}
    tasks = dict.fromkeys(task for _, task, measure in rows if measure == _LOSS)
    known = (_LOSS, _PERPLEXITY, _GAIN, _WORST, _FORGETTING, _OBJECTIVE)
    described = {(one["task"], one["measure"]): one for one in manifest.get("lm_eval", [])}
    shown = [(task, measure) for _, task, measure in rows]
    others = dict.fromkeys(key for key in shown if key in described or key[1] not in known)
    scored = [
        TaskScores(
            task,
            "loss, nats per token",
            False,
            _scores(rows, roles, task, _LOSS),
            tested.get(task),
            dataset=hub.get(task),
        )
        for task in tasks
    ]
    for task, measure in others:
        own = described.get((task, measure), {})
        scores = _scores(rows, roles, task, measure)
        scored.append(
            TaskScores(task, measure, own.get("higher_is_better", True), scores, percent=own.get("share", False))
        )
    return Page(
        title=folder.resolve().name,
        contenders=tuple(Contender(name, role) for name, role in roles.items()),
        reference=against if against in roles else "",
        winner=named if named in roles else "",
        tasks=tuple(scored),
        standings=tuple(_standings(rows, roles)),
        notes=(_NOTE,),
    )


def _scores(rows: Rows, roles: Mapping[str, Role], task: str, measure: str) -> tuple[Score, ...]:
    found = []
    for name in roles:
        if (name, task, measure) not in rows:
            continue
        line = rows[name, task, measure]
        own = measure == _LOSS
        gain = rows.get((name, task, _GAIN)) if own else None
        perplexity = rows.get((name, task, _PERPLEXITY)) if own else None
        found.append(
            Score(
                name,
                _estimate(line),
                _difference(line),
                _number(line["p"]),
                _number(gain["value"]) if gain else None,
                _number(perplexity["value"]) if perplexity else None,
            )
        )
    return tuple(found)


def _standings(rows: Rows, roles: Mapping[str, Role]) -> list[Standing]:
    worst = {name: line for (name, _, measure), line in rows.items() if measure == _WORST}
    forgotten = {name: line for (name, _, measure), line in rows.items() if measure == _FORGETTING}
    return [
        Standing(
            name,
            _estimate(line),
            _difference(line),
            _number(line["p"]),
            _number(worst[name]["value"]) if name in worst else None,
            worst[name]["task"] if name in worst else "",
            _estimate(forgotten[name]) if name in forgotten else None,
        )
        for name in roles
        if (line := rows.get((name, ALL_TASKS, _GAIN))) is not None
    ]


def _by_objective(standings: Sequence[Standing], rows: Rows) -> tuple[Standing, ...]:
    """The standings by what a search chose by; none where nobody's figure is known."""
    lines = {one.contender: rows.get((one.contender, ALL_TASKS, _OBJECTIVE)) for one in standings}
    if not any(line and line["value"] for line in lines.values()):
        return ()
    return tuple(
        dataclasses.replace(one, gain=_estimate(line), difference=_difference(line), p=_number(line["p"]))
        for one in standings
        if (line := lines[one.contender])
    )


def _estimate(line: Mapping[str, str]) -> Estimate:
    return Estimate(*(_number(line[key]) for key in ("value", "low", "high")))


def _difference(line: Mapping[str, str]) -> Estimate | None:
    ends = [_number(line[key]) for key in ("difference", "difference_low", "difference_high")]
    return None if ends[0] is None else Estimate(*ends)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _manifest(folder: Path) -> dict[str, Any]:
    """What the folder says about itself; nothing without a manifest, whose scores can still be shown."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
