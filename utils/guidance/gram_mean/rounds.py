"""Rounds after the first: what the round before measured is merged, and the inputs of that model are taken.

The merged model lies in the job's workspace while its inputs are measured, and is gone with it. It is the one that
commands 2 and 3 make of the measurement at their defaults, computed in float32.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from utils.errors import UserError
from utils.guidance.gram_mean.method import FORM, METHOD, ROUNDS, SPARSE
from utils.guidance.guided_recipe import guided_recipe
from utils.guidance.measure_job import MeasureJob
from utils.guidance.measured_pair import MeasuredPair, experts_to_merge
from utils.guidance.recipe_choices import RecipeOptions, settle
from utils.merging.guided.gram_method import GramMean
from utils.merging.planning import PlannedMerge, plan_recipe
from utils.merging.recipe_file import checked_recipe
from utils.merging.run import run_merge
from utils.merging.settings import MergeSettings
from utils.merging.small_files import write_small_files
from utils.models.checkpoints import open_checkpoint
from utils.models.experts_apart import with_experts_apart
from utils.models.stored_layout import stored_layout
from utils.passes.subjects import Subject
from utils.recipes.naming import LocalModels
from utils.recipes.recipe import recipe_bytes


def refuse_one_expert(job: MeasureJob) -> None:
    """Raise a `UserError` if rounds were asked for where nothing is merged: one expert is taken as it is."""
    if job.options[ROUNDS] > 1 and len(experts_to_merge(job.config)) < 2:
        raise UserError(
            f"--{ROUNDS} {job.options[ROUNDS]} takes the inputs of a merge, and one expert alone is merged as it is; leave "
            "it out",
            "measure-rounds-one-expert",
        )


def merging_bytes(job: MeasureJob) -> int:
    """Bytes that the merge between two rounds takes at its peak beside the runtime, about; 0 for one round."""
    if job.options[ROUNDS] == 1:
        return 0
    models, shapes = len(experts_to_merge(job.config)), [one.shape for one in job.base.checkpoint.tensors.values()]
    inputs = 4 * (models + 2) * max(map(math.prod, shapes))  # each model's tensor and the result, in float32
    return inputs + max(GramMean.arithmetic_bytes(tuple(shape), models) for shape in shapes)


@contextlib.contextmanager
def merged_subject(job: MeasureJob, number: int, files: Mapping[str, bytes | Path]) -> Iterator[Subject]:
    """The merge of what was measured, made ready like the base, for as long as the context lasts.

    Args:
        job: the whole job.
        number: of the round that was measured.
        files: what it measured, by the names of the dataframe folder.

    Raises:
        UserError: what commands 2 and 3 would say of it.
    """
    assert job.workspace is not None
    folder = job.workspace / f".round{number}"  # hidden: no result of a piece
    shutil.rmtree(folder, ignore_errors=True)
    try:
        measured, merged = folder / "measured", folder / "merged"
        for made in (measured, merged):
            made.mkdir(parents=True)
        for name, content in files.items():
            _put(content, measured / name)
        planned = _planned(job, measured, merged)
        run_merge(planned, merged)
        planned.check_unchanged()
        write_small_files(planned, merged)
        shutil.rmtree(measured)
        yield _subject(job, merged)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _planned(job: MeasureJob, measured: Path, merged: Path) -> PlannedMerge:
    """The merge that commands 2 and 3 make of a measurement, computed in float32 and stored as the base is."""
    config, trust = job.config, job.trust_remote_code
    models = LocalModels(config.base, experts_to_merge(config), trust_remote_code=trust)
    choices = settle(
        config,
        RecipeOptions(METHOD, {FORM: SPARSE}, dtype="float32", out_dtype=job.base.checkpoint.float_dtype),
    )
    manifest = {"guidance_options": dict(job.options)}
    made = guided_recipe(MeasuredPair(config, measured, manifest, None, models, ()), choices)
    path = measured / made.name
    text = recipe_bytes(made.data).decode()
    path.write_text(text, encoding="utf-8")
    device = "cpu" if job.workers is not None else str(job.devices[0])  # a cluster's GPUs are elsewhere
    settings = MergeSettings(merged, path, device=device, trust_remote_code=trust, quiet=True)
    return plan_recipe(settings, checked_recipe(path, text, dict(made.data)), lambda line: None)


def _subject(job: MeasureJob, merged: Path) -> Subject:
    base = job.base
    checkpoint = replace(
        with_experts_apart(open_checkpoint(str(merged), None), job.trust_remote_code), name="the merged model"
    )
    entry = replace(base.entry, name=str(merged))
    return replace(base, entry=entry, checkpoint=checkpoint, layout=stored_layout(base.decoder.model, checkpoint))


def _put(content: bytes | Path, place: Path) -> None:
    """Bytes, or the file of a piece, under another name; not copied where the file system can do without."""
    if isinstance(content, bytes):
        place.write_bytes(content)
        return
    try:
        os.link(content, place)
    except OSError:  # a file system without hard links
        shutil.copyfile(content, place)
