"""A recipe made a plan: its models opened, the merge planned tensor by tensor, everything said of it checked.

Only configs, headers and tokenizers are looked at. A plan is what `utils/merging/run.py` writes a model by, and
`utils/merging/merged_tensors.py` merges some tensors by in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.mergekit_api import MergeMethod, merge_method
from utils.merging.differences import check_configs, left_out, own_heads, prove_coverage
from utils.merging.guided.methods import OwnMethod, register_methods
from utils.merging.inputs import FoundModels, MergeInputs, find_models, open_inputs
from utils.merging.parameters import DensitySummary, check_parameters, density_summaries
from utils.merging.pieces.choice import Division, divide
from utils.merging.plan import MergePlan, plan_merge
from utils.merging.provenance import publishable
from utils.merging.recipe_check import check_recipe
from utils.merging.recipe_file import MergeRecipe
from utils.merging.resources import choose_merge_device
from utils.merging.saliency_plan import SaliencyFile, bind_saliency
from utils.merging.settings import MergeSettings
from utils.merging.vocabulary import VocabularyPlan, plan_vocabulary
from utils.models.architecture import plan_architecture
from utils.models.planned_tensors import DEFINITION, ArchitecturePlan
from utils.models.tokenizer_files import GENERATION
from utils.publishing.staging import Stamp, stamp
from utils.recipes.recipe_manifest import RecipeManifest, manifest_name, read_recipe_manifest, refuse_other_weights
from utils.runtime import device_name, gigabytes, versions


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that is known to fit together.

    `recipe` is the file, `origin` what command 2 recorded of it, without folders of this machine. `division` says which
    tensors are merged in pieces. `device` is torch's name. `densities` are there for a method that uses them, `saliency`
    are the files of vectors that a guided method reads. `token_donors` are folders of models of which tokens alone are
    taken. `warnings` are sentences. `stamps` are sizes and times of the inputs' weight files and of those with vectors.
    """

    settings: MergeSettings
    recipe: MergeRecipe
    origin: RecipeManifest | None
    plan: MergePlan
    division: Division
    device: str
    densities: tuple[DensitySummary, ...]
    saliency: tuple[SaliencyFile, ...]
    token_donors: tuple[Path, ...]
    warnings: tuple[str, ...]
    stamps: Mapping[Path, Stamp | None] = field(repr=False)

    @property
    def copied(self) -> list[str]:
        """The names of the donor's files, beside tokenizer and templates, of which the result gets copies if they are there."""
        donor = self.plan.inputs.donor.checkpoint
        code = self.settings.trust_remote_code and "auto_map" in donor.config
        names = sorted(path.name for path in donor.folder.glob("*.py")) if code else []
        return [GENERATION, *(self.plan.architecture.info.tagalong_files or []), *names]

    def check_unchanged(self) -> None:
        """Raise a `UserError` if a file that was read for the merge has changed since it was planned."""
        for path in self._changed():
            text = f"{path} changed while it was merged, so nothing was published; merge again"
            raise UserError(text, "merge-input-changed")

    def can_be_merged_again(self) -> bool:
        """Whether the files are as they were, or cannot be looked at now."""
        return not any(_stamp(path) for path in self._changed())

    def _changed(self) -> Iterator[Path]:
        return (path for path, before in self.stamps.items() if _stamp(path) != before)


@dataclass
class SharedPlans:
    """What plans of the same models have in common whatever the recipe's numbers: names and tokens. State: what was planned.

    Whoever plans many recipes hands one to all of them; files of tokenizers are taken not to change meanwhile.
    """

    _known: dict[tuple[Any, ...], tuple[ArchitecturePlan, VocabularyPlan, list[str]]] = field(
        default_factory=dict, repr=False
    )

    def of(
        self, inputs: MergeInputs, method: MergeMethod, settings: MergeSettings
    ) -> tuple[ArchitecturePlan, VocabularyPlan, list[str]]:
        """The names that are planned, what becomes of tokens, and how configs differ.

        Raises:
            UserError: the models or their tokenizers do not fit together.
        """
        recipe, keep_rows = inputs.config, isinstance(method, OwnMethod)
        flags = settings.trust_remote_code, settings.allow_crimes, settings.fused_experts, keep_rows
        models = [
            (one.reference, one.label, one.checkpoint.name, *map(_stamp, one.checkpoint.files)) for one in inputs.models
        ]
        tokens = recipe.base_model, recipe.tokenizer_source, repr(recipe.tokenizer), recipe.chat_template
        key = (*flags, recipe.models is None, *models, *tokens)
        if key not in self._known:
            self._known[key] = _names_and_tokens(inputs, settings, keep_rows=keep_rows)
        return self._known[key]


def plan_recipe(
    settings: MergeSettings,
    recipe: MergeRecipe,
    say: Callable[[str], None],
    shared: SharedPlans | None = None,
) -> PlannedMerge:
    """Check a recipe, find its models and plan the merge; the output folder of the settings is not looked at.

    Args:
        settings: the flags.
        recipe: the recipe file.
        say: takes the lines of the report, as the facts become known.
        shared: what was planned of other recipes.

    Raises:
        UserError: anything the user can mend.
    """
    return plan_models(settings, find_models(check_recipe(recipe)), say, shared=shared)


def plan_models(
    settings: MergeSettings,
    found: FoundModels,
    say: Callable[[str], None],
    opened: Callable[[MergeInputs], None] = lambda inputs: None,
    shared: SharedPlans | None = None,
) -> PlannedMerge:
    """Plan the merge of models that were found, as far as possible without reading weights.

    Args:
        settings: the flags; the output folder is not looked at.
        found: the checked recipe and its models.
        say: takes the lines of the report, as the facts become known.
        opened: called once the models are open, before the merge is planned.
        shared: what was planned of other recipes.

    Raises:
        UserError: anything the user can mend; see the functions this calls.
    """
    checked, recipe = found.recipe, found.recipe.file
    origin, doubt = read_recipe_manifest(recipe.path, recipe.sha256)
    if origin and origin.fused_experts and not settings.fused_experts:
        settings = replace(settings, fused_experts=True)
        say(f"experts of a mixture are merged stacked (--fused_experts), as {manifest_name(recipe.path.name)} has it")
    register_methods()
    method = merge_method(checked.method.name)
    device, why = choose_merge_device(settings, method)
    say(", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "transformers", "mergekit")))
    say(f"device: {device_name(device)}, {why}")
    inputs = open_inputs(found, settings)
    checkpoints = [model.checkpoint for model in inputs.models]
    stamps = {file: _stamp(file) for checkpoint in checkpoints for file in checkpoint.files}
    for line in _input_lines(inputs):
        say(line)
    opened(inputs)
    for line in refuse_other_weights(recipe.path, origin, {one.name.recorded: one.checkpoint for one in inputs.models}):
        say(line)
    warnings = [*([doubt] if doubt else []), *checked.idle_parameters()]
    architecture, vocabulary, differences = (shared or SharedPlans()).of(inputs, method, settings)
    warnings += differences
    plan = plan_merge(inputs, architecture, vocabulary, method, settings, str(device))
    warnings += [*left_out(plan), *own_heads(plan), *plan.vocabulary.warnings, *check_parameters(plan)]
    warnings += _idle_flags(settings, device)
    plan, saliency, idle = bind_saliency(plan, recipe, origin.vectors if origin else {})
    stamps |= {file.path: _stamp(file.path) for file in saliency}
    warnings += idle
    densities = tuple(density_summaries(plan)) if checked.method.cuts else ()
    computed = f"computed in {plan.dtype or 'the dtype of the inputs'}, saved in {plan.out_dtype}"
    say(f"merge: {checked.method.name} by {recipe.path.name}, seed {settings.random_seed}; {computed}")
    for line in (*_plan_lines(plan, densities), *_saliency_lines(plan, saliency)):
        say(line)
    return PlannedMerge(
        settings=settings,
        recipe=recipe,
        origin=publishable(origin) if origin and not doubt else None,
        plan=plan,
        division=divide(plan, settings),
        device=str(device),
        densities=densities,
        saliency=saliency,
        token_donors=tuple(found.folders[name] for name in checked.donors),
        warnings=tuple(dict.fromkeys(warnings)),
        stamps=stamps,
    )


def _names_and_tokens(
    inputs: MergeInputs, settings: MergeSettings, *, keep_rows: bool
) -> tuple[ArchitecturePlan, VocabularyPlan, list[str]]:
    donor, *others = (model.checkpoint for model in inputs.models)
    trust = settings.trust_remote_code
    differences = check_configs(inputs, trust_remote_code=trust)
    architecture = plan_architecture(
        donor,
        others,
        trust_remote_code=trust,
        allow_mixed=settings.allow_crimes,
        fused_experts=settings.fused_experts,
    )
    vocabulary = plan_vocabulary(inputs, architecture, trust_remote_code=trust, keep_rows=keep_rows)
    return architecture, vocabulary, differences


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp(path)
    except OSError:
        return None


def _idle_flags(settings: MergeSettings, device: torch.device) -> Iterator[str]:
    if settings.lazy_unpickle:
        yield "--lazy_unpickle does nothing: it is for pickled weights, and only safetensors are read"
    if device.type == "cpu":
        for name in ("low_cpu_memory", "read_to_gpu"):
            if getattr(settings, name):
                yield f"--{name} does nothing on the CPU"
    if settings.write_threads > 1 and not settings.async_write:
        yield "--write_threads does nothing without --async_write"


def _input_lines(inputs: MergeInputs) -> Iterator[str]:
    for model in inputs.models:
        checkpoint = model.checkpoint
        role = "base" if model.reference == inputs.config.base_model else "model"
        files = "1 file" if len(checkpoint.files) == 1 else f"{len(checkpoint.files)} files"
        yield (
            f"{role}: {checkpoint.name}, {checkpoint.architecture}, {checkpoint.float_dtype}, "
            f"{gigabytes(checkpoint.total_bytes)} in {files}"
        )


def _plan_lines(plan: MergePlan, densities: tuple[DensitySummary, ...]) -> Iterator[str]:
    origin = plan.architecture.origin
    why = "" if origin == DEFINITION else f" ({plan.architecture.reason})"
    yield f"tensors: {len(plan.tensors)} with {plan.params / 1e6:,.1f} M parameters, named by {origin}{why}"
    yield prove_coverage(plan)
    yield f"vocabulary: {plan.vocabulary.summary}"
    for one in densities:
        yield (
            f"density of {one.label}: mean {one.mean:.3f} over all parameters, {one.low:.3f} to {one.high:.3f}; below "
            f"1 in {one.guided} of {one.tensors} tensors"
        )


def _saliency_lines(plan: MergePlan, saliency: tuple[SaliencyFile, ...]) -> Iterator[str]:
    method = plan.method
    for file in saliency if isinstance(method, OwnMethod) else ():
        unknown = "" if file.recorded else " (nothing beside the recipe says which they were)"
        for label, count in file.tensors.items():
            yield f"saliency of {label}: {count} tensors are merged by the vectors in {file.written}{unknown}"
