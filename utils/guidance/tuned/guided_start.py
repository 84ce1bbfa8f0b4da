"""The start that another guidance makes of its own measurement in the same go: as far as it is known before, and as it is."""

import os
from dataclasses import dataclass
from pathlib import Path

from utils.guidance.guided_recipe import guided_recipe
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.measured_files import put_files
from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.method import GuidanceMethod
from utils.guidance.recipe_choices import RecipeChoices, RecipeOptions, settle
from utils.guidance.tuned.start import Start, read_start
from utils.publishing.disk import remove_tree
from utils.recipes.naming import LocalModels
from utils.recipes.recipe import recipe_bytes
from utils.recipes.routers import BASE, choose_routers
from utils.recipes.saliency_vectors import close_files

_FOLDER = ".start"  # in the workspace; hidden: no result of a piece


@dataclass(frozen=True)
class GuidedStart:
    """A start whose files are results of pieces, the names of these in the dataframe folder by expert type, and sentences about
    its recipe."""

    start: Start
    names: dict[str, str]
    warnings: tuple[str, ...]


def outlined_start(job: MeasureJob, first: GuidanceMethod, models: LocalModels) -> Start:
    """The start as far as it is known before anything is measured: equal weights, no files.

    Raises:
        UserError: what command 2 would say of the pair and the guidance `first`.
    """
    choices = _choices(job, first)
    types, rule, shared = [entry.type for entry in choices.experts], choices.rule, dict(choices.parameters)
    filters = choose_routers(None, models, (), rule, shared).filters
    weights = {name: 1 / len(types) for name in types}
    return Start(rule.name, shared, weights, dict.fromkeys(types, ""), {}, filters, BASE if filters else None)


def guided_start(job: MeasureJob, first: GuidanceMethod, measured: Measured, models: LocalModels) -> GuidedStart:
    """The recipe that command 2 makes, at its defaults, of what `first` has measured, read as one to start from.

    Raises:
        UserError: what command 2 would say of it; as `read_start`.
    """
    assert job.workspace is not None
    folder = job.workspace / _FOLDER
    remove_tree(folder)  # of a run that was killed
    folder.mkdir()
    try:
        put_files(measured.files, folder)
        manifest = {"guidance_options": dict(job.options), **first.depends_on(job)}
        made = guided_recipe(MeasuredPair(job.config, folder, manifest, None, models, ()), _choices(job, first))
        recipe = folder / made.name
        recipe.write_bytes(recipe_bytes(made.data))
        start = read_start(recipe, job.base.entry, made.choices.experts, models)
        names = {type_: Path(file).name for type_, file in start.saliency.items()}
    finally:
        close_files()  # some file systems keep what is still open, under another name
        remove_tree(folder)
    files = {type_: os.path.abspath(measured.files[name]) for type_, name in names.items()}
    return GuidedStart(start.reading(files), names, made.warnings)


def depends_on(job: MeasureJob, first: GuidanceMethod) -> dict[str, object]:
    """What the start depends on beside what `first` measures, as plain data."""
    choices = _choices(job, first)
    experts = [entry.type for entry in choices.experts]
    return {"started_from": {"parameters": dict(choices.parameters), "experts": experts}}


def _choices(job: MeasureJob, first: GuidanceMethod) -> RecipeChoices:
    options = {flag.name: flag.default for flag in first.flags("decide")}
    return settle(job.config, RecipeOptions(first, options))
