"""What an evaluation writes and prints: tables, samples, the page, the manifest, the verdict, the next command."""

import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from utils.commands.change_pictures import with_change_shares
from utils.commands.evaluate_accuracy import accuracy_record, printed_accuracy
from utils.commands.evaluate_options import ACCURACY, COMMAND, REPORT, SAMPLES, SCORES, EvaluateOptions
from utils.commands.evaluate_page import evaluation_page, model_records
from utils.commands.evaluate_tables import printed_table, samples_table, scores_table
from utils.commands.evaluated import Evaluated, Generated
from utils.commands.next_command import from_here, next_command
from utils.evaluation.candidates import UNIFORM, Candidate
from utils.evaluation.scoring import Scorer
from utils.evaluation.store import LossStore
from utils.merging.recipe_file import read_recipe
from utils.publishing.files import publish_files
from utils.publishing.manifest import with_manifest
from utils.recipes.recipe import recipe_bytes
from utils.reports.page import render
from utils.runtime import versions


def publish_evaluation(
    options: EvaluateOptions,
    scorer: Scorer,
    evaluated: Evaluated,
    generated: Generated,
    warnings: Sequence[str],
    store: LossStore,
    say: Callable[[str], None],
) -> None:
    """Publish all files, the manifest last; print the table, the verdict and the next command."""
    following = _next(options, evaluated)
    request = _request(options, scorer, evaluated) | {"lm_eval": accuracy_record(generated.accuracy)}
    page = evaluation_page(scorer, evaluated, request, warnings, following, generated)
    page = with_change_shares(page, scorer, evaluated, store, say)
    files = {
        SCORES: scores_table(evaluated, generated).to_csv(index=False).encode(),
        SAMPLES: _parquet(samples_table(scorer, evaluated)),
        REPORT: render(page).encode(),
    }
    if generated.accuracy is not None:
        files[ACCURACY] = _parquet(generated.accuracy.samples)
    if evaluated.best_uniform is not None:
        files[UNIFORM] = recipe_bytes(evaluated.best_uniform.recipe)
    files = with_manifest(files, request)
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
    print(f"the page to look at: {options.out_dir / REPORT}")
    if following:
        print(f"next:\n{following}")


def _recipe_hash(candidate: Candidate) -> str | None:
    """SHA-256 of the recipe file that has been scored, so that a merge by it can show its figures."""
    if candidate.recipe is None:
        return None
    if candidate.source is None:  # a control, which may be written
        return hashlib.sha256(recipe_bytes(candidate.recipe)).hexdigest()
    written = read_recipe(candidate.source)
    return written.sha256 if written.data == candidate.recipe else None


def _request(options: EvaluateOptions, scorer: Scorer, evaluated: Evaluated) -> dict[str, Any]:
    """What was asked, of what, on which rows: the manifest without the files."""
    return {
        "command": COMMAND,
        "versions": versions(),
        "settings": scorer.settings.record(),
        "reference": evaluated.reference,
        "reference_is": evaluated.reference_is,
        "best_on_validation": evaluated.winner,
        "models": model_records(scorer),
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


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _next(options: EvaluateOptions, evaluated: Evaluated) -> str:
    """The command that merges the winner, with its figures on the card, where that is a recipe: a file that was given, or
    the best uniform merge."""
    winner = next((one for one in evaluated.candidates if one.name == evaluated.winner), None)
    if winner is None or winner.recipe is None:
        return ""
    source = from_here(winner.source or options.out_dir / UNIFORM)
    folder = options.out_dir.parent / "merged_models" / re.sub(r"[^\w.-]+", "_", winner.name)
    flags = {"output_path": folder, "merge_config": source, "evaluation": options.out_dir, "report": True}
    return next_command("utils/merger.py", {**flags, "trust_remote_code": options.trust_remote_code})
