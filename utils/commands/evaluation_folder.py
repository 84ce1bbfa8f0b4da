"""The figures of an evaluation (or a search) read back from its folder, for whoever shows them elsewhere.

page = read_evaluation(Path("output/my_pair/evaluation"))
name = candidate_of(page, Path("ties.yaml"))                # whose figures a merge by this recipe has
text = evaluation_section(page, name)                       # utils.reports.card_table
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.publish import MANIFEST
from utils.reports.values import Contender, Estimate, Page, Role, Score, Standing, TaskScores

SCORES = "scores.csv"
_LOSS, _PERPLEXITY, _GAIN, _WORST, _FORGETTING = "loss", "perplexity", "gain_kept", "worst_gain_kept", "forgetting"
_ALL = "all tasks"
_NOTE = (
    "Intervals are 95% intervals over rows of text, paired: they hold the noise of the text, not that of training the "
    "experts again."
)

Rows = dict[tuple[str, str, str], dict[str, str]]  # (candidate, task, measure) -> a line of scores.csv


def read_evaluation(folder: Path) -> Page:
    """The scores in a folder as the values that a page shows; its history, samples and recipe are not in it.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    path = folder / SCORES
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        if not lines:
            raise ValueError("it holds no scores")
        manifest = _manifest(folder)
        rows = {(line["candidate"], line["task"], line["measure"]): line for line in lines}
        roles = {line["candidate"]: Role(line["role"]) for line in lines}
        return _page(folder, rows, roles, manifest)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: there is no {SCORES}, so this is no folder of utils/evaluator.py or utils/searcher.py",
            "evaluation-not-found",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as an evaluation ({type(error).__name__}: {error}); evaluate again, into another folder",
            "evaluation-unreadable",
        ) from error


def candidate_of(page: Page, recipe: Path) -> str:
    """The candidate that a recipe file is in an evaluation: the one of its name.

    Raises:
        UserError: none has that name.
    """
    names = [one.name for one in page.contenders if one.role is Role.CANDIDATE]
    if recipe.stem in names:
        return recipe.stem
    listed = ", ".join(names) or "none"
    raise UserError(
        f"{recipe} is none of the candidates of {page.title} ({listed}); evaluate this recipe, or say which it is",
        "evaluation-other-recipe",
    )


def _page(folder: Path, rows: Rows, roles: Mapping[str, Role], manifest: Mapping[str, Any]) -> Page:
    against = next((line["against"] for line in rows.values() if line["against"]), "")
    named = manifest.get("best_on_validation") or next(iter(manifest.get("best") or {}), "")
    tested = {one["name"]: len(one["rows"]["test"]) for one in manifest.get("tasks", [])}
    tasks = dict.fromkeys(task for _, task, measure in rows if measure == _LOSS)
    known = (_LOSS, _PERPLEXITY, _GAIN, _WORST, _FORGETTING)
    others = dict.fromkeys((task, measure) for _, task, measure in rows if measure not in known)
    scored = [
        TaskScores(task, "loss, nats per token", False, _scores(rows, roles, task, _LOSS), tested.get(task))
        for task in tasks
    ]
    scored += [TaskScores(task, measure, True, _scores(rows, roles, task, measure)) for task, measure in others]
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
        if (line := rows.get((name, _ALL, _GAIN))) is not None
    ]


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
