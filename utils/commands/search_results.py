"""What a search ends with: the winners scored on test rows, their recipes, tables, the page, the next command."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.commands.change_pictures import with_change_shares
from utils.commands.evaluate_generation import generate
from utils.commands.evaluate_page import evaluation_page, model_records
from utils.commands.evaluate_tables import printed_table, scores_table
from utils.commands.evaluated import Evaluated, Generated
from utils.commands.next_command import from_here, next_command
from utils.commands.search_folder import OUTDATED, refuse_edited, written_by_a_search
from utils.commands.search_options import BEST, BEST_STOCK, BEST_UNIFORM, COMMAND, REPORT, SCORES, TRIALS
from utils.commands.search_page import add_search
from utils.commands.search_setup import Prepared
from utils.errors import UserError
from utils.evaluation.candidates import Candidate, models_of_pair
from utils.evaluation.figures import all_figures, task_losses
from utils.evaluation.statistics import Figure, TaskLosses
from utils.evaluation.tasks import GENERAL, TEST
from utils.publishing.files import publish_files
from utils.publishing.manifest import MANIFEST, file_sha256, with_manifest
from utils.recipes.recipe import file_key, recipe_bytes, renamed_files
from utils.recipes.recipe_manifest import manifest_name
from utils.reports.page import render
from utils.reports.values import Page
from utils.runtime import versions
from utils.searching.objective import Objective
from utils.searching.records import recipe_record
from utils.searching.storage import require_optuna
from utils.searching.study import Finished
from utils.searching.winners import Winners, choose, trials_table


def publish_results(ready: Prepared, stopped: str, say: Callable[[str], None]) -> None:
    """Score the winners on test rows, publish all files, print the table, the verdict and the next command.

    Args:
        ready: the search, run.
        stopped: why it ended before its last trial; empty if it did not.
        say: prints, unless asked to be quiet.

    Raises:
        UserError: not one trial has a value.
    """
    finished = ready.study.finished(ready.yardstick.all_rows)
    if not finished:
        raise UserError(
            "no trial has been scored on every validation row yet"
            + (f" ({stopped})" if stopped else "")
            + "; type the "
            "command again to go on, with more of what it was short of",
            "search-nothing-finished",
        )
    winners = choose(finished, ready.objective, pareto=ready.options.pareto)
    names = _names(winners)
    evaluated = _on_test_rows(ready, winners, names)
    recipes = _recipes(ready, winners)
    following = _next(ready)
    device = ready.scorer.settings.device
    here = device.type != "cuda" or torch.cuda.is_available()  # a cluster's GPUs may all be elsewhere
    answers = ready.options.samples and here
    generated = generate(ready.scorer, evaluated, ready.store, None, answers=answers, say=say)
    warnings = [*ready.warnings, *generated.warnings]
    if ready.options.samples and not here:
        warnings.append("held-out prompts are not answered: this machine, which would do it, has no GPU")
    warnings += [f"the search ended early: {stopped}"] if stopped else []
    if ready.options.objective != "mean" and not evaluated.by_objective:
        warnings.append(
            f"no task that --objective {ready.options.objective} goes by has a gain to keep on test rows: what the search "
            "found is judged there by the other tasks' mean, or by losses"
        )
    request = _request(ready, evaluated, winners, names, stopped, recipes)
    page = _page(ready, evaluated, request, warnings, following, winners, names, generated, recipes)
    if here:
        page = with_change_shares(page, ready.scorer, evaluated, ready.store, say)
    files: dict[str, bytes | Path] = {
        **recipes,
        TRIALS: trials_table(ready.study, ready.objective).to_csv(index=False).encode(),
        SCORES: scores_table(evaluated, generated).to_csv(index=False).encode(),
        REPORT: render(page).encode(),
    }
    refuse_edited(ready.options.out_dir)  # again: hours may have passed
    outdated = _outdated(ready.options.out_dir, {*files, MANIFEST})
    gone = {OUTDATED: {path.name: digest for path, digest in outdated.items()}} if outdated else {}
    files = with_manifest(files, request | gone)
    publish_files(ready.options.out_dir, files, overwrite=True)
    for path in outdated:
        path.unlink(missing_ok=True)
    print(f"\n{printed_table(ready.scorer, evaluated)}\n")
    for line in page.notes:
        say(line)
    for line in warnings[len(ready.warnings) :]:
        print(f"warning: {line}")
    if page.verdict:
        print("\n" + "\n".join((page.verdict.sentence, *page.verdict.details)))
    print(f"\n{names[winners.best.digest]}: {winners.best.point.sentence()}")
    print("wrote " + ", ".join(str(ready.options.out_dir / name) for name in files))
    print(f"the page to look at: {ready.options.out_dir / REPORT}")
    print(f"next:\n{following}")


def _names(winners: Winners) -> dict[str, str]:
    """What to call each winner in tables, by digest."""
    found = {one.digest: one.known or f"trial {one.number}" for one in winners.all}
    if not winners.best.known:
        found[winners.best.digest] = f"best (trial {winners.best.number})"
    if winners.stock.digest != winners.best.digest and not winners.stock.known:
        found[winners.stock.digest] = f"best by a method of mergekit's (trial {winners.stock.number})"
    return found


def _on_test_rows(ready: Prepared, winners: Winners, names: Mapping[str, str]) -> Evaluated:
    """Score the pair and all winners on test rows, which nothing was chosen on."""
    scorer = ready.scorer
    pair = models_of_pair(scorer.config)
    chosen = [_candidate(ready, one, names[one.digest]) for one in winners.all]
    rows = {task.name: task.part(TEST) for task in scorer.tasks}
    table = ready.losses.score([*pair, *chosen], rows)
    base, experts = scorer.config.base.type, [entry.type for entry in scorer.config.experts]
    losses = task_losses(table, scorer.tasks, base, experts)
    reference = names[winners.uniform[0].digest] if winners.uniform else None
    tried = tuple(one.name for one in chosen if one.name != reference)
    chosen_by = None if ready.options.objective == "mean" else figure_of_gains(ready.objective, losses)
    figures = all_figures(losses, reference, tried, GENERAL, chosen_by=chosen_by)
    return Evaluated(
        candidates=(*pair, *chosen),
        figures={one.name: one for one in figures},
        losses=table,
        reference=reference,
        reference_is="the best uniform merge",
        winner=names[winners.best.digest],
        best_uniform=next((one for one in chosen if one.name == reference), None),
        scored=len(chosen),
        seconds=time.perf_counter() - ready.start,
        compared=tried,
        facts=(("routers of unguided recipes", routers),) if (routers := ready.maker.routers.said) else (),
    )


def figure_of_gains(objective: Objective, losses: Mapping[str, TaskLosses]) -> Figure | None:
    """The search's own figure of the gains of the tasks that have one on test rows, their weights adding up to 1; None
    where none of those that the search went by has one."""
    kind = "worst" if objective.worst else "weighted"
    weights = dict(zip(objective.tasks, objective.weights, strict=True))
    there = [name for name, one in losses.items() if one.has_gain]
    if not any(objective.worst or weights.get(name) for name in there):
        return None
    own = Objective.of(kind, there, weights)
    return lambda gains: own.figure(np.moveaxis(gains, 0, -1))


def _candidate(ready: Prepared, one: Finished, name: str) -> Candidate:
    role = "control" if one.point.uniform else "candidate"
    return Candidate(name, recipe=ready.maker.make(one.point).data, role=role)


def _recipes(ready: Prepared, winners: Winners) -> dict[str, bytes | Path]:
    """The recipes by file name, after the files of vectors they name, which lie beside them; their manifests behind."""
    wanted = {BEST: (winners.best, best := ready.maker.make(winners.best.point))}
    if winners.stock.digest != winners.best.digest or not best.stock:
        stock = ready.maker.for_stock(winners.stock.point)
        if not isinstance(stock, str):
            wanted[BEST_STOCK] = winners.stock, stock
    if winners.uniform:
        wanted[BEST_UNIFORM] = winners.uniform[0], ready.maker.make(winners.uniform[0].point)
    files: dict[str, bytes | Path] = {}
    for name, (one, made) in wanted.items():
        stem, places = name.removesuffix(".yaml"), {}
        experts = [entry["parameters"].get("saliency") for entry in made.data["models"][1:]]
        for path in made.vectors:
            expert = ready.space.experts[experts.index(str(path))]
            places[str(path)] = f"{stem}_{expert}_saliency.safetensors"
            files[places[str(path)]] = path
        vectors: dict[str, Path] = {}
        models = [_beside(entry, places, ready.options.out_dir, vectors) for entry in made.data["models"]]
        data = {**made.data, "models": models}
        files[name] = recipe_bytes(data, made.note)
        measured, search = ready.measured.get(one.point.guidance), _search_record(ready)
        record = recipe_record(
            ready.options.config, measured, one, (name, files[name]), data, vectors, search, made.fused
        )
        files[manifest_name(name)] = record.as_bytes()
    return files


def _outdated(folder: Path, files: Collection[str]) -> dict[Path, str]:
    """The files of this search's earlier result that have no successor in `files` and would pass for a part of it: a best
    stock recipe where the best one is stock now, say. What somebody has changed since is not among them. With their SHA-256."""
    gone = {folder / name: digest for name, digest in written_by_a_search(folder).items() if name not in files}
    return {path: digest for path, digest in gone.items() if path.is_file() and file_sha256(path) == digest}


def _search_record(ready: Prepared) -> dict[str, Any]:
    """What a recipe's manifest says of the search that found it."""
    options = ready.options
    return {
        "trials": len(ready.study.trials),
        "sampler": ready.study.sampler,
        "seed": options.seed,
        "objective": options.objective,
        "validation_rows": {task: len(rows) for task, rows in ready.yardstick.rows.items()},
        "rows_sha256": {task.name: task.digest for task in ready.scorer.tasks if task.measures_gain},
    }


def _beside(
    entry: Mapping[str, Any], places: Mapping[str, str], folder: Path, vectors: dict[str, Path]
) -> dict[str, Any]:
    """A model's entry with its files named from a folder; `vectors` gains these names and where the files are."""
    parameters = entry.get("parameters", {})
    if "saliency" not in parameters:
        return dict(entry)

    def named(file: str) -> str:
        found = places.get(file) or file_key(Path(file), folder)  # one of the measurement's own stays where it is
        vectors[found] = Path(file)
        return found

    return {**entry, "parameters": {**parameters, "saliency": renamed_files(parameters["saliency"], named)}}


def _next(ready: Prepared) -> str:
    """The command that merges the best recipe, with the search's figures on its card."""
    folder = ready.options.out_dir
    target = folder.resolve().parent / "merged_models" / folder.resolve().name
    flags = {"output_path": from_here(target), "merge_config": folder / BEST, "evaluation": folder, "report": True}
    return next_command("utils/merger.py", {**flags, "trust_remote_code": ready.options.trust_remote_code})


def _request(
    ready: Prepared,
    evaluated: Evaluated,
    winners: Winners,
    names: Mapping[str, str],
    stopped: str,
    recipes: Mapping[str, bytes | Path],
) -> dict[str, Any]:
    """What was searched, how, and what came first: the manifest without the files."""
    options, scorer = ready.options, ready.scorer
    uniform = winners.uniform[0] if winners.uniform else None
    return {
        "command": COMMAND,
        "versions": versions() | {"optuna": require_optuna().__version__},
        "settings": scorer.settings.record(),
        "options": {
            "trials": options.trials,
            "batch": options.batch,
            "sampler": ready.study.sampler,
            "objective": options.objective,
            "pareto": options.pareto,
            "seed": options.seed,
        },
        "search": ready.space.plain(),
        "measurements": {name: one.sha256 for name, one in ready.measured.items()},
        "stopped": stopped,
        "reference": evaluated.reference,
        "reference_is": evaluated.reference_is,
        "best_on_validation": evaluated.winner,
        "candidates": [
            {"name": names[one.digest], "recipe_sha256": hashlib.sha256(recipes[file]).hexdigest()}
            for file, one in ((BEST, winners.best), (BEST_STOCK, winners.stock), (BEST_UNIFORM, uniform))
            if file in recipes
            and (file != BEST_STOCK or ready.maker.for_stock(one.point).same)  # else not what was scored
        ],
        "best": {names[one.digest]: {"trial": one.number, **one.point.plain()} for one in winners.all},
        "models": model_records(scorer),
        "tasks": [task.record() for task in scorer.tasks],
    }


def _page(
    ready: Prepared,
    evaluated: Evaluated,
    request: Mapping[str, Any],
    warnings: Sequence[str],
    following: str,
    winners: Winners,
    names: Mapping[str, str],
    generated: Generated,
    recipes: Mapping[str, bytes | Path],
) -> Page:
    """The evaluator's page of the winners, with the search on it."""
    page = evaluation_page(ready.scorer, evaluated, request, warnings, following, generated)
    stock = ready.maker.for_stock(winners.stock.point)
    notes = [f"There is no recipe for stock mergekit: {stock}."] if isinstance(stock, str) else []
    page = dataclasses.replace(page, title=f"Search of {ready.scorer.config.path.stem}", notes=(*page.notes, *notes))
    return add_search(page, ready, evaluated, winners, names, recipes)
