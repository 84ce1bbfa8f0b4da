"""What is evaluated: a model that lies on disk or on the hub, or a recipe, whose model is never written."""

import copy
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.merging.recipe_check import ModelName, check_recipe
from utils.merging.recipe_file import (
    FILE_KEYS,
    INPUT_KEYS,
    MODEL_KEYS,
    MergeRecipe,
    checked_recipe,
    is_tokenizer_keyword,
    model_names,
    read_recipe,
)
from utils.models.checkpoints import Checkpoint, is_local
from utils.models.low_rank import adapter_name
from utils.models.opening import open_without_download
from utils.pair.config import PairConfig
from utils.publishing.manifest import sha256_of
from utils.recipes.recipe_manifest import (
    RecipeManifest,
    read_recipe_manifest,
    refuse_changed_files,
    refuse_other_weights,
)
from utils.safe_yaml import read_yaml_mapping

UNIFORM = "best_uniform.yaml"  # the file that an evaluation writes the best uniform merge's recipe to
_SUFFIXES = (".yaml", ".yml")
_LAYER_KEYS = ("slices", "modules")


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a recipe (plain data, as in its YAML) or a model (folder or hub id), never both.

    `folder` is where a recipe's relative names (models, files of vectors) begin; None for the current folder, which is
    what command 3 takes. `role` is `candidate`, or `base`, `expert` or `control` for those that the command adds. `source`
    is the file that a recipe was read from, if it was. `record` is what the manifest beside that file says,
    `fused_experts` as for command 3, if that says so.
    """

    name: str
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)
    model: str | None = None
    folder: Path | None = None
    revision: str | None = None
    role: str = "candidate"
    source: Path | None = None
    fused_experts: bool = False
    record: RecipeManifest | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.model is None):
            raise ValueError(f"candidate {self.name}: give a recipe or a model")

    def merge_recipe(self) -> MergeRecipe:
        """The recipe as command 3 would read it from a file in the current folder.

        Raises:
            UserError: it is no recipe, or a name in it is of two things, one here and one in `folder`.
        """
        assert self.recipe is not None
        data = copy.deepcopy(dict(self.recipe))
        file = f"{Path(self.name).name}.yaml"  # without the folder in a name, which names in it would be looked for in
        if self.folder is not None:
            beside = MergeRecipe(self.folder / file, "", data)
            for holder, key, name in _names(data):
                holder[key] = beside.locate(name)
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        return checked_recipe(Path(file), text, data)

    @property
    def name_with_folder(self) -> str:
        """`folder/name` for what lies on this disk, else the name."""
        if self.source is None and not is_local(self.model or ""):
            return self.name
        place = self.source or Path(os.path.expanduser(self.model))
        return f"{place.resolve().parent.name}/{self.name}"

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the candidate's weights beside the inputs' own: recipe and folder, or model."""
        parts = [self.recipe, str(self.folder) if self.folder else None, self.model, self.revision]
        return sha256_of([*parts, "fused_experts"] if self.fused_experts else parts)


def read_candidate(text: str) -> Candidate:
    """A candidate as somebody names it on the command line: a recipe file, a model folder, or a hub id.

    Raises:
        UserError: a file that is no recipe, or that names what is here and beside it, or files of vectors or weights that are
            not those it was made of; a folder that is not there.
    """
    path = Path(os.path.expanduser(text))
    if path.suffix in _SUFFIXES or path.is_file():
        return checked_against_record(_of_file(path))
    if adapter_name(text) is None and is_local(text) and not path.is_dir():
        raise UserError(
            f"candidate {text}: no such folder or file (looked in {Path.cwd()}); give a recipe (.yaml), a model folder "
            "or a hub id",
            "candidate-not-found",
        )
    return Candidate(path.name if is_local(text) else text, model=text)


def found_recipes(folder: Path) -> list[Candidate]:
    """The recipes (`*.yaml`) in a folder and in the folders in it, in name order; other YAML files are passed over, and
    so are the uniform merges that evaluations write. Whether files are those that a recipe was made of is not looked at:
    it may be another pair's (`checked_against_record`).

    Raises:
        UserError: a recipe with errors in it.
    """
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")])
    found = [path for path in paths if path.name != UNIFORM and _is_recipe(path)]
    return [_of_file(path) for path in found]


def _of_file(path: Path) -> Candidate:
    """The candidate of a recipe file, whose names may begin beside it."""
    recipe = read_recipe(path)
    for _, _, name in _names(copy.deepcopy(dict(recipe.data))):
        recipe.locate(name)  # refuses names that lead to two things
    return Candidate(path.stem, recipe=recipe.data, source=path, folder=path.absolute().parent)


def checked_against_record(candidate: Candidate) -> Candidate:
    """The candidate with what the manifest beside its recipe file says, if it has one.

    Raises:
        UserError: files of vectors or weights are not those that the recipe was made of, or the manifest is another's.
    """
    path = candidate.source
    if path is None or candidate.recipe is None:
        return candidate
    recipe = read_recipe(path)
    data = copy.deepcopy(dict(recipe.data))
    refuse_changed_files(path, {name: Path(recipe.locate(name)) for _, _, name in _names(data, keys=FILE_KEYS)})
    record, _ = read_recipe_manifest(path, recipe.sha256)
    models = check_recipe(recipe).models if record else ()
    refuse_other_weights(path, record, {one.recorded: _opened(recipe, one) for one in models})
    return candidate if record is None else replace(candidate, fused_experts=record.fused_experts, record=record)


def _opened(recipe: MergeRecipe, name: ModelName) -> Checkpoint | None:
    """A model that a recipe names, if it is on this machine."""
    place = recipe.locate(name.model.path)
    if name.lora is None:
        return open_without_download(place, name.model.revision)
    if name.lora.revision or "+" in place:
        return None
    return open_without_download(f"{place}+{recipe.locate(name.lora.path)}", name.model.revision)


def _is_recipe(path: Path) -> bool:
    try:
        data = read_yaml_mapping(path, "YAML file")
    except UserError:
        return False
    return "merge_method" in data and any(key in data for key in INPUT_KEYS)


def distinct_names(candidates: Sequence[Candidate], taken: Collection[str] = ()) -> list[Candidate]:
    """The candidates; where several have a name, with that of the folder before it, and with the next free number behind
    what is taken even so."""
    used, found = set(taken), []
    often = Counter(one.name for one in candidates)
    for one in candidates:
        own = one.name if often[one.name] == 1 else one.name_with_folder
        numbered = (f"{own} ({number})" for number in count(2))
        name = next(name for name in chain([own], numbered) if name not in used)
        used.add(name)
        found.append(one if name == one.name else replace(one, name=name))
    return found


def models_of_pair(config: PairConfig) -> list[Candidate]:
    """The base and the experts of a pair."""
    return [
        Candidate(entry.type, model=entry.name, revision=entry.revision, role=_role(config, entry.type))
        for entry in config.model_info
    ]


def _role(config: PairConfig, model_type: str) -> str:
    return "base" if model_type == config.base_model_type else "expert"


def refuse_other_models(candidate: Candidate, config: PairConfig) -> None:
    """Raise a `UserError` if a recipe merges models that are not the pair's, or onto another base."""
    if candidate.recipe is None:
        return
    data = candidate.merge_recipe().data
    ours = {_place(entry.name, entry.revision) for entry in config.model_info}
    listed = ", ".join(entry.name for entry in config.model_info)
    for name in dict.fromkeys(model_names({key: data[key] for key in (*INPUT_KEYS, "base_model") if key in data})):
        if _named_place(name) not in ours:
            raise UserError(
                f"recipe {candidate.name} merges {name}, which is no model of the pair ({listed}); give the pair config "
                "that it was made of",
                "candidate-other-models",
            )
    base = data.get("base_model")
    if isinstance(base, str) and _named_place(base) != _place(config.base.name, config.base.revision):
        raise UserError(
            f"recipe {candidate.name} merges onto {base}, the pair's base is {config.base.name}; its losses would be "
            "compared with another base",
            "candidate-other-base",
        )


def changes_layers(candidate: Candidate) -> bool:
    """Whether a recipe may build a model of other layers than its base's (`slices`, `modules`, passthrough)."""
    recipe = candidate.recipe or {}
    return any(recipe.get(key) for key in _LAYER_KEYS) or recipe.get("merge_method") == "passthrough"


def vector_files(data: Mapping[str, Any]) -> list[Path]:
    """The files of saliency vectors that a recipe names and that are there, each once."""
    paths = (Path(os.path.expanduser(text)) for _, _, text in _names(dict(data), keys=FILE_KEYS))
    return list(dict.fromkeys(path for path in paths if os.path.isfile(path)))


def _place(name: str, revision: str | None) -> tuple[str, str | None]:
    """What two names of one model have in common; of `model+adapter`, what each has."""
    if "+" in name and not os.path.exists(os.path.expanduser(name)):
        return "+".join(_place(part, None)[0] for part in name.split("+")), revision
    return (str(Path(os.path.expanduser(name)).resolve()) if is_local(name) else name, revision)


def _named_place(name: str) -> tuple[str, str | None]:
    """Where a recipe's model name leads; mergekit writes a revision behind an @."""
    path, _, revision = (name, "", "") if is_local(name) else name.partition("@")
    return _place(path, revision or None)


def _names(
    node: Any, keys: Sequence[str] = (*MODEL_KEYS, *FILE_KEYS), named: bool = False
) -> Iterator[tuple[Any, Any, str]]:
    """Every name under one of some keys (or under their conditional values): its holder, its key there, the name."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        here = key in keys or (named and (key == "value" or isinstance(node, list)))
        if isinstance(value, str) and here:
            if not is_tokenizer_keyword(key, value):
                yield node, key, value
        else:
            yield from _names(value, keys, here)
