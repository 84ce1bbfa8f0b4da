"""The evaluator's one job: candidates scored on held-out rows, their figures, a table, a verdict and a page."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.commands.evaluate_options import EvaluateOptions, refuse_out_dir
from utils.commands.next_command import from_here
from utils.commands.scorers import loss_scorers, make_scorers, scoring_devices
from utils.errors import UserError, warn
from utils.evaluation.candidates import (
    Candidate,
    checked_against_record,
    distinct_names,
    found_recipes,
    models_of_pair,
    read_candidate,
    refuse_other_models,
)
from utils.evaluation.controls import uniform_controls
from utils.evaluation.seen_rows import doubt_chosen_rows, refuse_measured_rows
from utils.evaluation.tasks import GENERAL, TEST, VALIDATION, task_texts
from utils.models.model_trial import ModelTrial
from utils.models.tokenizer import forget_handed_on
from utils.pair.presence import refuse_missing, small_files
from utils.progress_bar import progress_bar
from utils.publishing.files import repair_folder
from utils.publishing.target import locked_folder, prepare_folder
from utils.recipes.naming import LocalModels
from utils.recipes.routers import usual_routers
from utils.runtime import peak_gpu_memory, quiet_libraries, versions_line

if TYPE_CHECKING:
    from utils.commands.evaluated import Evaluated
    from utils.evaluation.scoring import Scorer
    from utils.evaluation.store import LossStore

LOSSES = "losses"  # the folder of what is kept for the next time


def evaluate(options: EvaluateOptions) -> None:
    """Check everything that can be known without weights, score what is new, publish the figures.

    Raises:
        UserError: anything the user can mend; nothing is published then, but losses that were computed are kept.
    """
    say = (lambda line: None) if options.quiet else (lambda line: print(line, flush=True))
    prepare_folder(options.out_dir, "--out_dir")
    mended = repair_folder(options.out_dir)
    warn([mended] if mended else [])
    candidates, left_out = _candidates(options)
    refuse_out_dir(options)
    refuse_missing(options.config, [text.source for text in task_texts(options.config).values() if text.source])
    quiet_libraries()
    models = [(one.model, one.revision) for one in candidates if one.model is not None]
    trial = None if options.trust_remote_code else ModelTrial(small_files(options.config, models))

    # torch, pandas and what is built on them, once nothing simpler can be wrong
    from utils.commands.evaluate_generation import do_tasks_side_by_side, generate
    from utils.commands.evaluate_results import publish_evaluation
    from utils.evaluation.entries import sweep_written
    from utils.evaluation.lm_eval_scores import find_tasks
    from utils.evaluation.store import LossStore

    say(versions_line("torch", "transformers", "mergekit"))
    devices = scoring_devices(options, say)
    asked = [name for text in options.config.evaluation.values() for name in text.lm_eval]
    accuracy = find_tasks(asked, options.confirm_run_unsafe_code) if asked else None
    if trial is not None:
        trial.check()
    scorers = make_scorers(options, devices, random_seed=options.random_seed, say=say)
    scorer = scorers[0]
    if not options.candidates:
        candidates, seen = _without_measured(scorer, candidates)
        left_out = [*left_out, *seen]
    against = _reference(options, candidates)
    warnings = _check(scorer, candidates, left_out, options.controls)
    forget_handed_on()
    _say_choices(scorer, candidates, say)
    controls, routers = _controls(scorer, say) if options.controls else ({}, "")
    store = LossStore(options.out_dir / LOSSES)
    with locked_folder(options.out_dir):
        store.sweep()
        sweep_written(options.out_dir)
        _refuse_little_disk(scorer, candidates, controls, store)
        start = time.perf_counter()
        evaluated = _evaluate(options, loss_scorers(scorers), candidates, controls, against, store)
        if routers:
            evaluated = replace(evaluated, facts=(("routers of the uniform merges", routers),))
        weights, forward = (sum(getattr(one.seconds, part) for one in scorers) for part in ("weights", "forward"))
        say(
            f"scored {evaluated.scored} models and merges anew (pair and uniform merges included) in "
            f"{time.perf_counter() - start:.2f} s (weights {weights:.1f} s, "
            f"forward {forward:.1f} s){peak_gpu_memory(devices)}"
        )
        batch = options.lm_eval_batch
        if accuracy is not None and len(scorers) > 1:
            do_tasks_side_by_side(scorers, evaluated, store, accuracy, batch, say)
        generated = generate(scorer, evaluated, store, accuracy, answers=options.samples, batch_size=batch, say=say)
        publish_evaluation(options, scorer, evaluated, generated, [*warnings, *generated.warnings], store, say)


def _candidates(options: EvaluateOptions) -> tuple[list[Candidate], list[str]]:
    """What was asked for on the command line; without that, the recipes beside the output folder that are of this pair,
    and a note for each that is of another."""
    asked, left_out = [], []
    for one in map(read_candidate, options.candidates):
        refuse_other_models(one, options.config)
        asked.append(one)
    for one in [] if options.candidates else found_recipes(options.out_dir.resolve().parent):
        try:
            refuse_other_models(one, options.config)
        except UserError as error:
            if not set(error.codes) <= {"candidate-other-models", "candidate-other-base"}:
                raise
            left_out.append(f"{from_here(one.source)} is left out: {error}")
        else:
            asked.append(checked_against_record(one))
    taken = [entry.type for entry in options.config.model_info]
    taken += _control_names(options)
    return distinct_names(asked, taken), left_out


def _reference(options: EvaluateOptions, candidates: Sequence[Candidate]) -> str | None:
    """The name in the table of what --against names; None for the best uniform merge."""
    if options.against is None:
        return None
    known = [entry.type for entry in options.config.model_info] + [one.name for one in candidates]
    known += _control_names(options)
    typed = dict(zip(options.candidates, (one.name for one in candidates), strict=False))
    path = Path(os.path.expanduser(options.against)).resolve()
    files = {one.source.resolve(): one.name for one in candidates if one.source is not None}
    name = typed.get(options.against) or files.get(path, options.against)
    if name not in known:
        raise UserError(
            f"--against {options.against} is in no row of the table; give a candidate's file, or one of {', '.join(known)}",
            "evaluate-against-unknown",
        )
    return name


def _control_names(options: EvaluateOptions) -> list[str]:
    """What the uniform merges are called that are scored, too; their recipes' dtype and routers do not matter to that."""
    grid = uniform_controls(options.config, "float32") if options.controls else {}
    return [one.name for kind in grid.values() for one in kind]


def _without_measured(scorer: "Scorer", candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
    """The candidates that were not measured on rows they would be scored on, and a note for each other one."""
    taken, left_out = [], []
    for one in candidates:
        try:
            refuse_measured_rows(scorer.tasks, one.record and one.record.samples, "it")
        except UserError as error:
            left_out.append(f"{from_here(one.source)} is left out: {error}")
        else:
            taken.append(one)
    return taken, left_out


def _check(scorer: "Scorer", candidates: Sequence[Candidate], left_out: Sequence[str], controls: bool) -> list[str]:
    """Everything that can be refused of candidates before weights are read; warnings, and the notes on what was left out
    before, are printed and handed on. `controls`: whether uniform merges are scored, too."""
    from utils.models.relative_change import strangers

    config = scorer.config
    found = [*left_out, *scorer.warnings]
    found += strangers(scorer.inputs, config.base.type, [entry.type for entry in config.experts])
    for one in candidates:
        if one.record is not None:
            refuse_measured_rows(scorer.tasks, one.record.samples, f"recipe {one.name}")
            found += doubt_chosen_rows(scorer.tasks, one.record.search, f"recipe {one.name}")
        found += [f"{one.name}: {warning}" for warning in scorer.check(one)]
    if not candidates:
        found.append(
            "no candidate was given and no recipe lies beside --out_dir: only the pair is scored"
            + (", and uniform merges" if controls else "")
        )
    found = list(dict.fromkeys(found))
    warn(found)
    return found


def _controls(scorer: "Scorer", say: Callable[[str], None]) -> tuple[dict[str, list[Candidate]], str]:
    """The uniform merges to compare with, by kind; of mixtures with the routers that guided recipes have, which is said."""
    config, trust = scorer.config, scorer.settings.merge.trust_remote_code
    routers = usual_routers(LocalModels(config.base, config.experts_to_merge, trust_remote_code=trust))
    if routers.said:
        say(f"routers of the uniform merges: {routers.said}")
    return uniform_controls(config, scorer.inputs[config.base.type].float_dtype, routers), routers.said


def _refuse_little_disk(
    scorer: "Scorer", candidates: Sequence[Candidate], grid: dict[str, list[Candidate]], store: "LossStore"
) -> None:
    """Refuse before anything is scored what is still to be scored, has to be written for that and has no room; of each
    kind one control stands for all."""
    from utils.evaluation.store import unscored

    test = {task.name: task.part(TEST) for task in scorer.tasks}
    validation = {task.name: task.part(VALIDATION) for task in scorer.tasks if task.measures_gain}
    controls = [kind[0] for kind in grid.values()]
    left = [*unscored(scorer, store, candidates, test), *unscored(scorer, store, controls, validation)]
    scorer.refuse_little_disk(left)


def _say_choices(scorer: "Scorer", candidates: Sequence[Candidate], say: Callable[[str], None]) -> None:
    for task in scorer.tasks:
        whose = f" (text of {' and '.join(task.experts)})" if task.experts else ""
        say(f"task {task.name}{whose}: {task.summary}")
    for one in candidates:
        what = (
            f"model {one.model}"
            if one.recipe is None
            else f"recipe, {one.recipe['merge_method']}, {from_here(one.source)}"
        )
        say(f"candidate {one.name}: {what}")


def _evaluate(
    options: EvaluateOptions,
    scorers: "Sequence[Scorer]",
    candidates: Sequence[Candidate],
    grid: dict[str, list[Candidate]],
    against: str | None,
    store: "LossStore",
) -> "Evaluated":
    """Choose the controls (and the winner) on validation rows, take everybody's figures on test rows."""
    from utils.commands.evaluated import Evaluated
    from utils.evaluation.figures import all_figures, merit, task_losses
    from utils.evaluation.placing import score_placed

    start, scored, scorer = time.perf_counter(), 0, scorers[0]
    pair = models_of_pair(scorer.config)
    base, experts = scorer.config.base.type, [entry.type for entry in scorer.config.experts]
    learned = [task for task in scorer.tasks if task.measures_gain]
    chosen, merits, can_win, best_uniform = [], {}, set(), None
    contenders = [*candidates, *(one for kind in grid.values() for one in kind)]
    if contenders:
        rows = {task.name: task.part(VALIDATION) for task in learned}
        with _progress(options, scorers, "choosing on validation rows"):
            table, scored = score_placed(scorers, store, [*pair, *contenders], rows)
        losses = task_losses(table, learned, base, experts)
        merits = {one.name: merit(losses, one.name) for one in contenders}
        chosen = [max(kind, key=lambda one: merits[one.name]) for kind in grid.values()]
        can_win = {name for name, value in merits.items() if value > -math.inf}  # the others' merges are not finite
        best_uniform = max(
            (one for one in chosen if one.name in can_win), key=lambda one: merits[one.name], default=None
        )
        chosen += [one for kind in grid.values() for one in kind if one.name == against and one not in chosen]
    everybody = (*pair, *chosen, *candidates)
    rows = {task.name: task.part(TEST) for task in scorer.tasks}
    with _progress(options, scorers, "scoring test rows"):
        table, more = score_placed(scorers, store, everybody, rows)
    losses = task_losses(table, scorer.tasks, base, experts)
    reference, reference_is = against, ""
    if best_uniform is not None and against in (None, best_uniform.name):
        reference, reference_is = best_uniform.name, "the best uniform merge"
    ranked = [one.name for one in (*candidates, *chosen) if one.name in can_win]
    winner = max(ranked, key=lambda name: merits[name], default=None)
    compared = tuple(one.name for one in candidates)
    figures = all_figures(losses, reference, compared, GENERAL)
    return Evaluated(
        everybody,
        {one.name: one for one in figures},
        table,
        reference,
        reference_is,
        winner,
        best_uniform,
        max(scored, more),
        time.perf_counter() - start,
        compared=compared,
    )


@contextlib.contextmanager
def _progress(options: EvaluateOptions, scorers: "Sequence[Scorer]", what: str) -> Iterator[None]:
    """One bar for the blocks of all passes, for as long as the context lasts."""
    shown = dict.fromkeys(range(len(scorers)), (0, 0))  # done and steps of each device
    with progress_bar(what, 0, "block", quiet=options.quiet) as bar:

        def show(place: int, done: int, steps: int) -> None:
            shown[place] = done, steps
            bar.total = sum(steps for _, steps in shown.values())
            bar.update(sum(done for done, _ in shown.values()) - bar.n)

        for place, scorer in enumerate(scorers):
            scorer.on_step = partial(show, place)
        yield
