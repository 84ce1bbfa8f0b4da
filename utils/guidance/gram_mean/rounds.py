"""Rounds after the first: what the round before measured is merged, and the inputs of that model are taken.

The merged model lies in the job's workspace while its inputs are measured, and is gone with it. It is the one that
commands 2 and 3 make of the measurement at their defaults, computed in float32 and stored as the base is.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.errors import UserError, warn
from utils.guidance.gram_mean.expert_file import (
    BaseAndExpert,
    ExpertGrams,
    names_written,
    piece_name,
    said_if_not_finite,
    side_of,
    write_inputs,
)
from utils.guidance.gram_mean.input_pass import BlockInputs, Kept, input_pass
from utils.guidance.gram_mean.method import BETWEEN_ROUNDS, EXPERT_INPUTS, FORM, METHOD, ROUNDS, SPARSE, gram_file
from utils.guidance.guided_recipe import guided_recipe
from utils.guidance.measure_job import MeasureJob
from utils.guidance.measured_files import put_files
from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.recipe_choices import RecipeChoices, RecipeOptions, settle
from utils.mergekit_api import GatherTensors
from utils.merging.planning import PlannedMerge, plan_recipe
from utils.merging.recipe_file import checked_recipe
from utils.merging.resources import memory_estimate
from utils.merging.run import run_merge
from utils.merging.settings import MergeSettings
from utils.merging.small_files import write_small_files
from utils.models.experts_apart import with_experts_apart
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.passes.snapshots import Snapshots
from utils.passes.subjects import Subject
from utils.publishing.disk import remove_tree
from utils.recipes.gram_file import GramFileWriter
from utils.recipes.naming import LocalModels
from utils.recipes.recipe import model_key, recipe_bytes
from utils.recipes.saliency_vectors import close_files
from utils.workers.piece import Piece, Place
from utils.workers.results import kept_value

_SHARD = 10**9  # bytes of merged tensors that wait in memory for each other


def check(job: MeasureJob) -> None:
    """Refuse what the merge between two rounds would refuse, as far as it is known before anything is measured.

    Raises:
        UserError: one expert, which is merged as it is; what commands 2 and 3 would say of the pair.
    """
    if len(job.config.experts_to_merge) < 2:
        raise UserError(
            f"--{ROUNDS} {job.options[ROUNDS]} takes the inputs of a merge, and one expert alone is merged as it is; give "
            f"--{ROUNDS} 1",
            "measure-rounds-one-expert",
        )
    for tensor in _outlined(job).plan.tensors:
        if not isinstance(tensor.task.gather_tensors, GatherTensors):
            raise UserError(
                f"--{ROUNDS} {job.options[ROUNDS]}: the vocabularies of {job.config.path}'s models differ, so that "
                f"{tensor.name} of the merge between two rounds has rows that nothing is measured of; give --{ROUNDS} 1",
                "measure-rounds-vocabulary",
            )


def depends_on(job: MeasureJob) -> dict[str, Any]:
    """What the merges between rounds are decided by beside what is measured, as plain data."""
    experts = [entry.type for entry in job.config.experts_to_merge]
    return {BETWEEN_ROUNDS: {"parameters": dict(_choices(job).parameters), "experts": experts}}


def merging_bytes(job: MeasureJob) -> int:
    """Bytes that a merge between two rounds takes at its peak beside the runtime, about."""
    planned = _outlined(job)
    return memory_estimate(planned.plan, planned.division, planned.settings)


def measured_again(
    job: MeasureJob, number: int, files: Mapping[str, bytes | Path], found: Sequence[ExpertGrams]
) -> list[ExpertGrams]:
    """Merge what the round `number` measured, and measure the inputs of that for every expert.

    Args:
        job: the whole job.
        number: 1 for the first round.
        files: what it measured, by the names of the dataframe folder; the results lie in the workspace like these.
        found: what its pieces gave.

    Raises:
        UserError: what commands 2 and 3 would say of it.
    """
    if (there := _results(job, number)) is not None:
        return there
    if not job.quiet:
        print(f"round {number + 1} of {job.options[ROUNDS]}: what has been measured is merged", flush=True)
    with _merged_subject(job, number, files) as merged:
        return job.run([_piece(job, expert, merged, one, files, number)
                        for expert, one in zip(job.experts, found, strict=True)])  # fmt: skip


def _results(job: MeasureJob, number: int) -> list[ExpertGrams] | None:
    """What the pieces of a round gave a run that was stopped after it; None unless all are there: then nothing is merged."""
    assert job.workspace is not None
    names = [piece_name(expert.entry.type, number) for expert in job.experts]
    found = [kept_value(job.workspace, name, (ExpertGrams,)) for name in names]
    return None if None in found else found


@contextlib.contextmanager
def _merged_subject(job: MeasureJob, number: int, files: Mapping[str, bytes | Path]) -> Iterator[Subject]:
    """The merge of what was measured, made ready like the base, for as long as the context lasts."""
    assert job.workspace is not None
    for left in job.workspace.glob(".round*"):  # of a run that was killed; hidden: no results of pieces
        remove_tree(left)
    folder = job.workspace / f".round{number}"
    try:
        measured, merged = folder / "measured", folder / "merged"
        for made in (measured, merged):
            made.mkdir(parents=True, exist_ok=True)
        put_files(files, measured)
        planned = _decided(job, measured, merged)
        if number == 1:
            warn(list(planned.warnings))
        run_merge(planned, merged)
        planned.check_unchanged()
        write_small_files(planned, merged)
        close_files()  # some file systems keep what is still open, under another name
        remove_tree(measured)
        yield _subject(job, merged)
    finally:
        close_files()
        remove_tree(folder)


def _decided(job: MeasureJob, measured: Path, merged: Path) -> PlannedMerge:
    """The merge that commands 2 and 3 make of a measurement."""
    config = job.config
    models = LocalModels(config.base, config.experts_to_merge, trust_remote_code=job.trust_remote_code)
    manifest = {"guidance_options": dict(job.options)}
    made = guided_recipe(MeasuredPair(config, measured, manifest, None, models, ()), _choices(job))
    return _planned(job, made.data, measured / made.name, merged)


def _outlined(job: MeasureJob) -> PlannedMerge:
    """The same merge as far as it is known before anything is measured: without weights, matrices and vectors."""
    config, choices = job.config, _choices(job)
    experts = [{"model": model_key(entry), "parameters": {"weight": 1.0, "saliency": ""}} for entry in choices.experts]
    data = {
        "models": [{"model": model_key(config.base)}, *experts],
        "merge_method": METHOD.merge_method,
        "base_model": model_key(config.base),
        "parameters": dict(choices.parameters),
        "dtype": choices.options.dtype,
        "out_dtype": choices.options.out_dtype,
        "tokenizer_source": "union",
    }
    return _planned(job, data, Path(f"{config.path.stem}_between_rounds.yaml"), Path("merged"))


def _choices(job: MeasureJob) -> RecipeChoices:
    stored = job.base.checkpoint.float_dtype
    return settle(job.config, RecipeOptions(METHOD, {FORM: SPARSE}, dtype="float32", out_dtype=stored))


def _planned(job: MeasureJob, data: Mapping[str, Any], path: Path, merged: Path) -> PlannedMerge:
    device = "cpu" if job.workers is not None else str(job.devices[0])  # a cluster's GPUs are elsewhere
    settings = MergeSettings(
        merged,
        path,
        device=device,
        trust_remote_code=job.trust_remote_code,
        out_shard_size=_SHARD,
        quiet=job.quiet,
    )
    return plan_recipe(settings, checked_recipe(path, recipe_bytes(data).decode(), dict(data)), lambda line: None)


def _subject(job: MeasureJob, merged: Path) -> Subject:
    base = job.base
    checkpoint = with_experts_apart(open_checkpoint(str(merged), None), job.trust_remote_code)
    entry = replace(base.entry, name=str(merged))
    return replace(base, entry=entry, checkpoint=checkpoint, layout=stored_layout(base.decoder.model, checkpoint))


def _piece(
    job: MeasureJob,
    expert: Subject,
    merged: Subject,
    found: ExpertGrams,
    files: Mapping[str, bytes | Path],
    number: int,
) -> Piece:
    """The piece that takes an expert's inputs at a merged model; all else is as the round before found it."""
    name, blocks = expert.entry.type, len(expert.decoder.blocks)
    arguments = (job.of(job.base, expert, merged), found, files[gram_file(name)])
    return Piece(piece_name(name, number), _measure_inputs, arguments, blocks, name, types=(ExpertGrams,))


def _measure_inputs(place: Place, job: MeasureJob, found: ExpertGrams, earlier: Path) -> ExpertGrams:
    """An expert's matrices with the inputs of a merged model; `found` and the file `earlier` are of the round before."""
    assert place.folder is not None
    base, expert, merged = job.subjects
    models, snapshots = BaseAndExpert(base, expert), Snapshots(place.snapshot, outlives_pass=True)
    target = place.folder / gram_file(expert.entry.type)
    path = target if place.snapshot is None else place.snapshot.with_suffix(".grams")
    tensors, begun = _begun(snapshots, path)
    with GramFileWriter(path, names_written(models), begun) as file, said_if_not_finite(expert):

        def on_inputs(layer: int, inputs: BlockInputs) -> None:
            if layer == 0 and tensors:  # what a run that was stopped has left cannot be gone on with
                tensors.clear()
                file.begin_anew()
            tensors.extend(write_inputs(file, layer, inputs, models))

        def state() -> tuple[list[tuple], dict[str, Any]]:
            file.sync()
            return list(tensors), file.state()

        side = side_of(place, job, merged, expert)
        with_stacks, kept = job.options[EXPERT_INPUTS], Kept(snapshots, state)
        input_pass(side, place.device, place.on_step, on_inputs, kept, with_stacks=with_stacks)
        file.add_gradients(earlier)
    if path != target:
        os.replace(path, target)
    snapshots.forget()
    return replace(found, tensors=tensors)


def _begun(snapshots: Snapshots, path: Path) -> tuple[list[tuple], dict[str, Any] | None]:
    """What a run that was stopped has made of a merged model's inputs: rows, and the state of the file of matrices."""
    snapshot = snapshots.load()
    if snapshot is None:
        return [], None
    if not path.is_file():
        snapshots.forget()
        return [], None
    tensors, begun = snapshot.state
    return list(tensors), begun
