"""The files of a recipe: the vectors it names, its YAML, and the manifest that says what it was made of."""

from collections.abc import Mapping
from typing import Any

from utils.guidance.guided_recipe import Control, GuidedRecipe
from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.portable_recipe import Portable
from utils.pair.config import PairConfig
from utils.publishing.manifest import content_sha256
from utils.recipes.named_model import named_model
from utils.recipes.recipe import recipe_bytes
from utils.recipes.recipe_manifest import RecipeManifest, manifest_name
from utils.recipes.saliency_vectors import open_vectors
from utils.runtime import versions


def recipe_files(
    measured: MeasuredPair, made: GuidedRecipe, control: Control | Portable | None = None
) -> dict[str, bytes]:
    """Contents by file name, in the order to publish them in: a recipe after its vectors, its manifest after it.

    Args:
        measured: what the recipe was made of.
        made: the guided recipe.
        control: the unguided recipe made beside it, or the one for stock mergekit; its files instead of the guided one's.
    """
    name, data, vectors = (made.name, made.data, made.vectors) if control is None else (control.name, control.data, {})
    hashes = {file: content_sha256(bytes_) for file, bytes_ in vectors.items()}
    if control is None:
        hashes |= {
            made.settings.saliency[key]: open_vectors(measured.folder / file).content_hash()
            for key, file in made.decision.measured.items()
        }
    content = recipe_bytes(data, _note(made, control))
    record = RecipeManifest(
        recipe={"name": name, "sha256": content_sha256(content)},
        vectors=hashes,
        guidance=made.choices.method.name,
        guidance_options=dict(made.choices.options.method_options),
        control=None if control is None else control.kind,
        merge_method=data["merge_method"],
        mean_density=made.choices.options.mean_density,
        lambda_=data["parameters"].get("lambda"),
        dtype=data["dtype"],
        out_dtype=data.get("out_dtype"),
        fused_experts=isinstance(control, Portable) and control.fused,
        **measurement_record(measured.config, measured),
    )
    return {**vectors, name: content, manifest_name(name): record.as_bytes()}


def _note(made: GuidedRecipe, beside: Control | Portable | None) -> str:
    """What the first line of a recipe says of stock mergekit; "" where nothing is special."""
    if isinstance(beside, Portable):
        return f"for stock mergekit-yaml, and {_here(beside)}; {beside.said}; the guided recipe: {made.name}"
    only_here = made.only_here if beside is None else beside.only_here
    return f"for utils/merger.py alone: {only_here}" if only_here else ""


def _here(portable: Portable) -> str:
    """What merges it here; the flag is for a copy without its manifest, which says so, too."""
    return "utils/merger.py --fused_experts" if portable.fused else "utils/merger.py"


def measurement_record(config: PairConfig, measured: MeasuredPair | None) -> dict[str, Any]:
    """What the manifest of a recipe says of the pair and of its measurement, None for a recipe without one."""
    manifest = (measured.manifest if measured else None) or {}
    return {
        "measure_options": manifest.get("guidance_options"),
        "options": _pair_options(config),
        "samples": manifest.get("samples"),
        "measurement": _measurement(measured, manifest) if measured and manifest else None,
        "versions": versions(),
    }


def _measurement(measured: MeasuredPair, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Which measurement it was, and of which weights: of models by their names in the recipe, as they are here or were."""
    config, listed = measured.config, manifest.get("models")
    recorded = {one.get("type"): one for one in listed if isinstance(one, dict)} if isinstance(listed, list) else {}
    models = []
    for entry in (config.base, *config.experts_to_merge):
        before = recorded.get(entry.type, {})
        sample = measured.models.samples.get(entry.type) or before.get("sample_sha256")
        if before and sample:
            name = named_model(entry)
            record = {"model": name.path, "revision": name.revision, "adapter": name.adapter}
            models.append({**record, "sample_sha256": sample})
    return {"sha256": measured.sha256, "versions": manifest.get("versions"), "models": models}


def _pair_options(config: PairConfig) -> dict[str, Any]:
    return {
        **config.options(),
        "target_model_names": dict(config.target_model_names),
        "global_parameters": dict(config.global_parameters),
    }
