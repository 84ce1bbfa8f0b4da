"""The manifest beside a recipe: what the recipe was made of, for whoever merges by it. JSON; the recipe stays as it is.

`<recipe without .yaml>.manifest.json` holds, under the keys of this file:

| key | content |
|---|---|
| `command` | the command that wrote it |
| `recipe` | `name` and `sha256` of the recipe it belongs to |
| `vectors` | the hash of each file that the recipe names, by its name there (`SaliencyVectors.content_hash`) |
| `guidance`, `guidance_options` | the method, and the values of command 2's own flags of it (gamma, epsilon ...) |
| `measure_options` | the values of command 1's flags of it |
| `control` | null, or the kind of unguided recipe this is; `portable`: the guided one's means for stock mergekit |
| `merge_method`, `mean_density`, `lambda`, `dtype`, `out_dtype` | what else the recipe was asked for |
| `options` | the pair config's settings, `global_parameters` and `target_model_names` among them |
| `samples` | texts and their rows, as the measurement's manifest has them |
| `measurement` | `sha256` of the measurement's manifest, its `versions`, and `sample_sha256` (`content_sample`) of the `models`, each by path, `revision` and `adapter` as the recipe names it; null for bare tables |
| `versions` | of the libraries that command 2 ran with |
| `fused_experts` | whether its filters are for stacked experts, as stock mergekit has them: command 3 merges it so |
| `search` | only beside a recipe that a search found: which trial of how many, and on which rows it was chosen |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from utils.bounded_files import read_json
from utils.errors import Problem, UserError, raise_collected
from utils.models.checkpoints import Checkpoint
from utils.models.content_sample import content_sample
from utils.publishing.manifest import to_json
from utils.recipes.named_model import NamedModel
from utils.recipes.saliency_vectors import open_vectors

PORTABLE = "portable"  # the kind of recipe that stock mergekit runs in a guided one's place
COMMAND, SEARCHER = "lewis_merge", "utils/searcher.py"
SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class RecipeManifest:
    """What a recipe was made of. The fields are the keys of the file, `lambda_` as `lambda`."""

    recipe: Mapping[str, str]
    vectors: Mapping[str, str]
    guidance: str
    guidance_options: Mapping[str, Any]
    measure_options: Mapping[str, Any] | None
    control: str | None
    merge_method: str
    mean_density: float | None
    lambda_: float | None
    dtype: str
    out_dtype: str | None
    options: Mapping[str, Any]
    samples: Any
    measurement: Mapping[str, Any] | None
    versions: Mapping[str, str]
    fused_experts: bool = False
    search: Mapping[str, Any] | None = None

    def as_data(self) -> dict[str, Any]:
        """The file's content as plain data."""
        data = {key.rstrip("_"): value for key, value in vars(self).items() if key != "search"}
        found = {"command": COMMAND if self.search is None else SEARCHER, **data}
        return found if self.search is None else {**found, "search": self.search}

    def as_bytes(self) -> bytes:
        """The file's content."""
        return to_json(self.as_data())


def manifest_name(recipe: str) -> str:
    """The file name of the manifest of a recipe of this file name; it lies beside it."""
    return recipe.removesuffix(".yaml").removesuffix(".yml") + SUFFIX


def read_recipe_manifest(recipe: Path, sha256: str) -> tuple[RecipeManifest | None, str]:
    """The manifest beside a recipe, and a sentence if it is one of other content.

    Args:
        recipe: the recipe file.
        sha256: the hash of the recipe's bytes.

    Returns:
        (manifest, ""); (None, "") without the file; (manifest, sentence) if it belongs to other bytes: an edited recipe.

    Raises:
        UserError: the file is not one of these manifests.
    """
    path = recipe.with_name(manifest_name(recipe.name))
    if not os.path.lexists(path):
        return None, ""
    try:
        data = read_json(path, str(path), finite=True)
    except UserError as error:
        raise UserError(f"{error}; {_REMEDY}", "recipe-manifest-unreadable") from error
    own = {key.rstrip("_"): key for key in RecipeManifest.__dataclass_fields__ if key != "search"}
    own = {COMMAND: own, SEARCHER: {**own, "search": "search"}}.get(str(data.get("command")))
    where = f"{path} is not a manifest as lewis_merge.py and utils/searcher.py write it"
    if own is None or set(own) - set(data) - {"fused_experts"}:  # which older ones lack
        raise UserError(f"{where}; {_REMEDY}", "recipe-manifest-malformed")
    try:
        found = TypeAdapter(RecipeManifest).validate_python(
            {field: data[key] for key, field in own.items() if key in data}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step).rstrip("_") for step in first["loc"])
        raise UserError(f"{where}: {place}: {first['msg']}; {_REMEDY}", "recipe-manifest-malformed") from error
    if found.recipe.get("sha256") != sha256:
        return found, f"{path.name} was written for other content of {recipe.name} (edited since?); it is not used"
    return found, ""


def refuse_changed_files(recipe: Path, named: Mapping[str, Path]) -> None:
    """Refuse files of vectors that are not those a recipe was made of, as far as its manifest says.

    Args:
        recipe: the recipe file.
        named: by their names in the recipe, where the files are; one that is not there is for others to miss.

    Raises:
        UserError: files are others; all of them in one message. The manifest is none.
    """
    record, _ = read_recipe_manifest(recipe, "")
    recorded = record.vectors if record else {}
    there = {name: Path(os.path.expanduser(path)) for name, path in named.items() if name in recorded}
    found = {name: open_vectors(path) for name, path in there.items() if path.is_file()}
    refuse_other_files(recipe, {name: (one.path, one.content_hash()) for name, one in found.items()}, recorded)


def refuse_other_files(recipe: Path, found: Mapping[str, tuple[Path, str]], recorded: Mapping[str, str]) -> None:
    """Refuse files that are not those that a recipe was made of.

    Args:
        recipe: the recipe file.
        found: by their names in the recipe, where the files are, and their hashes.
        recorded: the hashes that its manifest has, by those names; one that it lacks is not looked at.

    Raises:
        UserError: files are others; all of them in one message.
    """
    raise_collected(
        (
            Problem(
                f"{path} is not the file that the recipe was made of: its hash is {sha256[:12]}, {manifest_name(recipe.name)} "
                f"has {recorded[name][:12]}. It was measured again, or belongs to another expert; put the right one there, or "
                "make the recipe again (lewis_merge.py --overwrite)",
                "saliency-other-file",
            )
            for name, (path, sha256) in found.items()
            if recorded.get(name, sha256) != sha256
        ),
        f"merge recipe {recipe}",
    )


def refuse_other_weights(
    recipe: Path, record: RecipeManifest | None, models: Mapping[NamedModel, Checkpoint | None]
) -> list[str]:
    """Refuse models whose weights are not those that a guided recipe was made for.

    Args:
        recipe: the recipe file.
        record: its manifest; None without one, when nothing is known.
        models: the models as the recipe names them; None for one whose weights are not here. One that the manifest lacks is
            not looked at, and neither is one with an adapter whose changes are among its own weights by now.

    Returns:
        A sentence for each model of the manifest that was not compared.

    Raises:
        UserError: weights are others; all models in one message.
    """
    if record is None or record.control not in (None, PORTABLE):
        return []
    listed = (record.measurement or {}).get("models")
    entries = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list | tuple) else []
    recorded = {_named(one): one.get("sample_sha256") for one in entries}
    open_ones = {name: one for name, one in models.items() if one is not None}
    found = {
        name: one for name, one in open_ones.items() if name in recorded and bool(name.adapter) == bool(one.adapter)
    }
    raise_collected(
        (
            Problem(
                f"the weights of {name} are not those that the recipe was made for; measure again and make the recipe again, "
                "or, to keep the earlier measurement, run lewis_merge.py again with --overwrite --accept_edited",
                "recipe-other-weights",
            )
            for name, checkpoint in found.items()
            if recorded[name] != content_sample(checkpoint)
        ),
        f"merge recipe {recipe}",
    )
    return [
        f"weights of {name}: not compared with those that the recipe was made for"
        for name in recorded
        if name not in found
    ]


def _named(entry: Mapping[str, Any]) -> NamedModel:
    """A model of the manifest; earlier ones have only whether there is an adapter, and match none that has one."""
    return NamedModel(str(entry.get("model")), entry.get("revision") or None, str(entry.get("adapter") or "") or None)


_REMEDY = "make the recipe again with --overwrite, or remove the manifest"
