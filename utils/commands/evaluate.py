"""The evaluator's one job: candidates scored on held-out rows, their figures, a table, a verdict and a page."""

import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands.evaluate_generation import find_accuracy_tasks, generate
from utils.commands.evaluated import Evaluated, Generated
from utils.commands.measure import quiet_libraries
from utils.commands.next_command import next_command
from utils.commands.scorers import make_scorers, scoring_devices
from utils.errors import UserError
from utils.evaluation.candidates import UNIFORM
from utils.pair.config import PairConfig
from utils.publishing.files import publish_files
from utils.publishing.manifest import MANIFEST, file_sha256, to_json
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing
from utils.runtime import peak_gpu_memory, versions

if TYPE_CHECKING:
    import pandas as pd

    from utils.evaluation.candidates import Candidate
    from utils.evaluation.scoring import Scorer
    from utils.evaluation.store import LossStore

COMMAND = "utils/evaluator.py"
SCORES, SAMPLES = "scores.csv", "samples.parquet"
LOSSES = "losses"  # the folder of what is kept for the next time
ACCURACY = "lm_eval_samples.parquet"
REPORT = "report.html"
FILES = (SCORES, SAMPLES, ACCURACY, REPORT, UNIFORM, MANIFEST)


@dataclass(frozen=True)
class EvaluateOptions:
    """What the evaluator was asked to do; `candidates` are as typed."""

    config: PairConfig
    out_dir: Path
    candidates: tuple[str, ...] = ()
    against: str | None = None
    controls: bool = True
    samples: bool = True
    test_rows: int = 128
    validation_rows: int = 64
    device: str = "auto"
    devices: str | None = None
    dtype: str = "auto"
    micro_batch_tokens: int | None = None
    random_seed: int = 0
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    overwrite: bool = False
    quiet: bool = False


def evaluate(options: EvaluateOptions) -> None:
    """Check everything that can be known without weights, score what is new, publish the figures.

    Raises:
        UserError: anything the user can mend; nothing is published then, but losses that were computed are kept.
    """
    say = (lambda line: None) if options.quiet else (lambda line: print(line, flush=True))
    prepare_folder(options.out_dir, "--out_dir")
    candidates = _candidates(options)
    _refuse_out_dir(options)
    quiet_libraries()
    say(
        "versions: "
        + ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "transformers", "mergekit"))
    )
    devices = scoring_devices(options, say)
    asked = [name for text in options.config.evaluation.values() for name in text.lm_eval]
    accuracy = find_accuracy_tasks(asked, options.confirm_run_unsafe_code)
    scorers = make_scorers(options, devices, random_seed=options.random_seed, say=say)
    scorer = scorers[0]
    against = _reference(options, candidates)
    warnings = _check(scorer, candidates)
    _say_choices(scorer, candidates, say)
    from utils.evaluation.store import LossStore

    store = LossStore(options.out_dir / LOSSES)
    with locked_folder(options.out_dir):
        start = time.perf_counter()
        evaluated = _evaluate(options, scorers, candidates, against, store)
        weights, forward = (sum(getattr(one.seconds, part) for one in scorers) for part in ("weights", "forward"))
        say(
            f"scored {evaluated.scored} new candidates in {time.perf_counter() - start:.2f} s (weights {weights:.1f} s, "
            f"forward {forward:.1f} s){peak_gpu_memory(devices)}"
        )
        generated = generate(scorer, evaluated, store, accuracy, answers=options.samples, say=say)
        _publish(options, scorer, evaluated, generated, [*warnings, *generated.warnings])


def _candidates(options: EvaluateOptions) -> "list[Candidate]":
    """What was asked for on the command line; without that, the recipes beside the output folder."""
    from utils.evaluation.candidates import distinct_names, found_recipes, read_candidate, refuse_other_models

    asked = [read_candidate(text) for text in options.candidates] or found_recipes(options.out_dir.resolve().parent)
    for one in asked:
        refuse_other_models(one, options.config)
    return distinct_names(asked, {entry.type for entry in options.config.model_info})


def _refuse_out_dir(options: EvaluateOptions) -> None:
    """Refuse a folder of files that are not an earlier evaluation's, or that somebody has changed since."""
    try:
        earlier = json.loads((options.out_dir / MANIFEST).read_text(encoding="utf-8"))
        files = earlier["files"] if earlier["command"] == COMMAND else {}
    except (OSError, ValueError, KeyError, TypeError):
        files = {}
    ours = all(file_sha256(options.out_dir / name) == digest for name, digest in files.items() if
               (options.out_dir / name).is_file())  # fmt: skip
    refuse_existing(options.out_dir, list(FILES), overwrite=options.overwrite or (bool(files) and ours))


def _reference(options: EvaluateOptions, candidates: "Sequence[Candidate]") -> str | None:
    """The name in the table of what --against names; None for the best uniform merge."""
    if options.against is None:
        return None
    known = [entry.type for entry in options.config.model_info] + [one.name for one in candidates]
    typed = dict(zip(options.candidates, (one.name for one in candidates), strict=False))
    name = typed.get(options.against, options.against)
    if name not in known:
        raise UserError(
            f"--against {options.against} is in no row of the table; give one of {', '.join(known)}",
            "evaluate-against-unknown",
        )
    return name


def _check(scorer: "Scorer", candidates: "Sequence[Candidate]") -> list[str]:
    """Everything that can be refused of candidates before weights are read; warnings are printed and handed on."""
    from utils.models.relative_change import strangers

    config = scorer.config
    found = strangers(scorer.inputs, config.base.type, [entry.type for entry in config.experts])
    for one in candidates:
        found += [f"{one.name}: {warning}" for warning in scorer.check(one)]
    if not candidates:
        found.append(
            "no candidate was given and no recipe lies beside --out_dir: only the pair and uniform merges are scored"
        )
    found = list(dict.fromkeys(found))
    for warning in found:
        print(f"warning: {warning}", file=sys.stderr)
    return found


def _say_choices(scorer: "Scorer", candidates: "Sequence[Candidate]", say: Callable[[str], None]) -> None:
    for task in scorer.tasks:
        whose = f" (text of {' and '.join(task.experts)})" if task.experts else ""
        say(f"task {task.name}{whose}: {task.summary}")
    for one in candidates:
        what = f"recipe, {one.recipe['merge_method']}" if one.recipe is not None else f"model {one.model}"
        say(f"candidate {one.name}: {what}")


def _evaluate(
    options: EvaluateOptions,
    scorers: "Sequence[Scorer]",
    candidates: "Sequence[Candidate]",
    against: str | None,
    store: "LossStore",
) -> Evaluated:
    """Choose the controls (and the winner) on validation rows, take everybody's figures on test rows."""
    from utils.evaluation.candidates import models_of_pair
    from utils.evaluation.controls import uniform_controls
    from utils.evaluation.figures import all_figures, merit, task_losses
    from utils.evaluation.placing import score_placed
    from utils.evaluation.tasks import GENERAL, TEST, VALIDATION

    start, scored, scorer = time.perf_counter(), 0, scorers[0]
    pair = models_of_pair(scorer.config)
    base, experts = scorer.config.base.type, [entry.type for entry in scorer.config.experts]
    dtype = scorer.inputs[base].float_dtype
    grid = uniform_controls(scorer.config, dtype) if options.controls else {}
    learned = [task for task in scorer.tasks if task.measures_gain]
    chosen, merits = [], {}
    contenders = [*candidates, *(one for kind in grid.values() for one in kind)]
    if contenders:
        rows = {task.name: task.part(VALIDATION) for task in learned}
        with _progress(options, scorers, "choosing on validation rows"):
            table, scored = score_placed(scorers, store, [*pair, *contenders], rows)
        losses = task_losses(table, learned, base, experts)
        merits = {one.name: merit(losses, one.name) for one in contenders}
        chosen = [max(kind, key=lambda one: merits[one.name]) for kind in grid.values()]
    everybody = (*pair, *chosen, *candidates)
    rows = {task.name: task.part(TEST) for task in scorer.tasks}
    with _progress(options, scorers, "scoring test rows"):
        table, more = score_placed(scorers, store, everybody, rows)
    losses = task_losses(table, scorer.tasks, base, experts)
    reference, reference_is = against, ""
    if against is None and chosen:
        reference, reference_is = max(chosen, key=lambda one: merits[one.name]).name, "the best uniform merge"
    ranked = [one.name for one in (*candidates, *chosen)]
    winner = max(ranked, key=lambda name: merits[name], default=None)
    figures = all_figures(losses, reference, [one.name for one in candidates], GENERAL)
    return Evaluated(
        everybody,
        {one.name: one for one in figures},
        table,
        reference,
        reference_is,
        winner,
        max(scored, more),
        time.perf_counter() - start,
    )


class _progress:
    """One bar for the blocks of all passes, on stderr, for as long as the context lasts."""

    def __init__(self, options: EvaluateOptions, scorers: "Sequence[Scorer]", what: str) -> None:
        self.quiet, self.scorers, self.what = options.quiet, scorers, what

    def __enter__(self) -> None:
        from tqdm import tqdm

        bar = self.bar = tqdm(desc=self.what, unit="block", disable=self.quiet, file=sys.stderr, total=0)

        shown = dict.fromkeys(range(len(self.scorers)), (0, 0))  # done and steps of each device

        def show(place: int, done: int, steps: int) -> None:
            shown[place] = done, steps
            bar.total = sum(steps for _, steps in shown.values())
            bar.update(sum(done for done, _ in shown.values()) - bar.n)

        for place, scorer in enumerate(self.scorers):
            scorer.on_step = partial(show, place)

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def _publish(
    options: EvaluateOptions,
    scorer: "Scorer",
    evaluated: Evaluated,
    generated: Generated,
    warnings: Sequence[str],
) -> None:
    from utils.commands.evaluate_page import evaluation_page
    from utils.commands.evaluate_tables import printed_accuracy, printed_table, samples_table, scores_table
    from utils.recipes.recipe import recipe_bytes
    from utils.reports.page import render

    following = _next(options, evaluated)
    request = _request(options, scorer, evaluated)
    page = evaluation_page(scorer, evaluated, request, warnings, following, generated)
    files = {
        SCORES: scores_table(evaluated, generated).to_csv(index=False).encode(),
        SAMPLES: _parquet(samples_table(scorer, evaluated)),
        REPORT: render(page).encode(),
    }
    if generated.accuracy is not None:
        files[ACCURACY] = _parquet(generated.accuracy)
    best = evaluated.best_control()
    if best is not None:
        files[UNIFORM] = recipe_bytes(best.recipe)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[MANIFEST] = to_json({**request, "files": digests})
    publish_files(options.out_dir, files, overwrite=True)
    print(f"\n{printed_table(scorer, evaluated)}\n")
    if generated.accuracy is not None:
        files_line = printed_accuracy(evaluated, generated)
        print(f"{files_line}\n")
    for line in page.notes:
        print(line)
    if page.verdict:
        print("\n" + "\n".join((page.verdict.sentence, *page.verdict.details)))
    print("\nwrote " + ", ".join(str(options.out_dir / name) for name in files))
    if following:
        print(f"next:\n{following}")


def _recipe_hash(candidate: "Candidate") -> str | None:
    """SHA-256 of the recipe file that has been scored, so that a merge by it can show its figures."""
    from utils.merging.recipe_file import read_recipe
    from utils.recipes.recipe import recipe_bytes

    if candidate.recipe is None:
        return None
    if candidate.source is None:  # a control, which may be written
        return hashlib.sha256(recipe_bytes(candidate.recipe)).hexdigest()
    written = read_recipe(candidate.source)
    return written.sha256 if written.data == candidate.recipe else None


def _request(options: EvaluateOptions, scorer: "Scorer", evaluated: Evaluated) -> dict[str, Any]:
    """What was asked, of what, on which rows: the manifest without the files."""
    from utils.models.checkpoints import weight_file_record

    return {
        "command": COMMAND,
        "versions": versions(),
        "settings": scorer.settings.record(),
        "reference": evaluated.reference,
        "best_on_validation": evaluated.winner,
        "models": [{"type": name, **weight_file_record(checkpoint)} for name, checkpoint in scorer.inputs.items()],
        "candidates": [
            {
                "name": one.name,
                "role": one.role,
                "model": one.model if one.model is None else os.path.basename(one.model.rstrip("/")),
                "sha256": scorer.fingerprint(one),
                "recipe_sha256": _recipe_hash(one),
            }
            for one in evaluated.candidates
        ],
        "tasks": [task.record() for task in scorer.tasks],
    }


def _parquet(table: "pd.DataFrame") -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _next(options: EvaluateOptions, evaluated: Evaluated) -> str:
    """The command that merges the winner, where that is a recipe: a file that was given, or the best uniform merge."""
    winner = next((one for one in evaluated.candidates if one.name == evaluated.winner), None)
    if winner is None or winner.recipe is None:
        return ""
    source = winner.source or options.out_dir / UNIFORM
    folder = options.out_dir.parent / "merged_models" / re.sub(r"[^\w.-]+", "_", winner.name)
    return next_command("utils/merger.py", {"output_path": folder, "merge_config": source})
