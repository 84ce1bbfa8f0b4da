"""The recipe that tuning starts from: one merge method, one weight for each expert, and what its files are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import Problem, UserError, raise_collected
from utils.merging.recipe_file import MergeRecipe, checked_recipe, read_recipe
from utils.pair.config import ModelEntry
from utils.publishing.manifest import file_sha256
from utils.recipes.method_rules import GRAM_MEAN, GUIDED_MEAN, TASK_ARITHMETIC
from utils.recipes.recipe import model_key, recipe_bytes
from utils.recipes.recipe_manifest import refuse_changed_files

METHODS = (TASK_ARITHMETIC.name, GUIDED_MEAN.name, GRAM_MEAN.name)
_MODEL_KEYS = {"weight", "saliency"}


@dataclass(frozen=True)
class Start:
    """A merge that is a sum of parts, one for each expert.

    `weights` are those of the recipe by expert type, `saliency` the absolute paths of the files that its method reads,
    none for plain changes, and `sha256` these files' hashes: coefficients hold for the parts that were made of them.
    `parameters` are the shared ones.
    """

    merge_method: str
    parameters: Mapping[str, Any]
    weights: Mapping[str, float]
    saliency: Mapping[str, str]
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the parts are the changes themselves, so that a coefficient is a factor of the weight."""
        return self.merge_method == TASK_ARITHMETIC.name

    def part_recipe(self, base: ModelEntry, experts: Sequence[ModelEntry], kept: str) -> MergeRecipe:
        """The recipe, in float32, that adds the part of one expert alone."""
        models: list[dict[str, Any]] = [{"model": model_key(base)}]
        for entry in experts:
            factor = 1.0 if entry.type == kept else 0.0
            weight = self.weights[entry.type]
            own = {"weight": weight * factor} if self.is_plain else {"weight": weight, "factor": factor}
            if entry.type in self.saliency:
                own["saliency"] = self.saliency[entry.type]
            models.append({"model": model_key(entry), "parameters": own})
        data = {
            "models": models,
            "merge_method": self.merge_method,
            "base_model": model_key(base),
            "parameters": dict(self.parameters),
            "dtype": "float32",
            "out_dtype": "float32",
        }
        return checked_recipe(Path(f"part of {kept}"), recipe_bytes(data).decode(), data)


def plain_start(experts: Sequence[ModelEntry]) -> Start:
    """The plain mean of the experts' changes."""
    weights = {entry.type: 1 / len(experts) for entry in experts}
    return Start(TASK_ARITHMETIC.name, {"normalize": False}, weights, {})


def read_start(path: Path, base: ModelEntry, experts: Sequence[ModelEntry]) -> Start:
    """Read a recipe to start from.

    Args:
        path: the recipe.
        base: the pair's base.
        experts: those to merge, each of which the recipe must name once.

    Raises:
        UserError: it cannot be read, merges other models, is no sum of parts with one weight each, or reads files that it
            was not made of. All problems of a
            kind are in the one message.
    """
    recipe = read_recipe(path)
    data, where = recipe.data, f"{recipe.where} cannot be tuned"
    if data["merge_method"] not in METHODS:
        raise UserError(
            f"{where}: {data['merge_method']} is no sum of what single experts add; give one of {', '.join(METHODS)}",
            "tuned-start-method",
        )
    if "models" not in data:
        raise UserError(f"{where}: it merges slices or modules; give one with models", "tuned-start-inputs")
    parameters = dict(data.get("parameters") or {})
    if parameters.get("normalize"):
        raise UserError(
            f"{where}: with normalize the weights of one expert change what the others add; set normalize: false",
            "tuned-start-normalize",
        )
    found = {_name(model.get("model")): model.get("parameters") or {} for model in data["models"]}
    wanted = {_name(model_key(entry)): entry.type for entry in experts}
    _refuse_other_models(found, {*wanted, _name(model_key(base))}, where)
    problems: list[Problem] = []
    weights, saliency = {}, {}
    for name, type_ in wanted.items():
        own = found[name]
        problems += [
            Problem(f"{name}: {key} cannot be kept; leave it out", "tuned-start-parameter")
            for key in own
            if key not in _MODEL_KEYS and not (key in ("density", "factor") and _one_value(own[key]) == 1)
        ]
        weight = _one_value(own.get("weight", parameters.get("weight")))
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            problems.append(Problem(f"{name}: weight must be one number for all tensors", "tuned-start-weight"))
        weights[type_] = weight
        if isinstance(own.get("saliency"), list):
            problems.append(Problem(f"{name}: saliency must be one file for all tensors", "tuned-start-parameter"))
        elif own.get("saliency"):
            saliency[type_] = os.path.abspath(os.path.expanduser(recipe.locate(str(own["saliency"]))))
    raise_collected(problems, where)
    if absent := [file for file in saliency.values() if not os.path.isfile(file)]:
        raise UserError(
            f"{where}: it reads {absent[0]}, which is not there; keep the dataframe folder where the recipe found it, or "
            "measure and make the recipe again",
            "vectors-missing",
        )
    refuse_changed_files(
        path,
        {str(found[name]["saliency"]): Path(saliency[type_]) for name, type_ in wanted.items() if type_ in saliency},
    )
    return Start(data["merge_method"], parameters, weights, saliency, _hashes(saliency))


def refuse_changed_parts(start: Start, where: Path) -> None:
    """Raise a `UserError` if a file that the parts were made of is not there any more, or is another one."""
    for type_, file in start.saliency.items():
        if not os.path.isfile(file) or file_sha256(Path(file)) != start.sha256.get(type_):
            state = "is another file now" if os.path.isfile(file) else "is not there any more"
            raise UserError(
                f"dataframe folder {where}: {file}, which the tuned recipe reads for {type_}, {state}, and the coefficients "
                "hold for what it was; tune again (lewis_importance.py --guidance tuned)",
                "tuned-parts-changed",
            )


def _hashes(files: Mapping[str, str]) -> dict[str, str]:
    return {type_: file_sha256(Path(file)) for type_, file in files.items()}


def _refuse_other_models(found: Mapping[str, Any], wanted: set[str], where: str) -> None:
    if absent := sorted(wanted - {*found}):
        raise UserError(
            f"{where}: it does not merge {', '.join(absent)} of the pair config; give a recipe of this pair",
            "tuned-start-models",
        )
    if strangers := sorted({*found} - wanted):
        raise UserError(
            f"{where}: it also merges {', '.join(strangers)}, which the pair config does not; add it there, or leave it out",
            "tuned-start-models",
        )


def _name(model: Any) -> str:
    """A model's name as far as two spellings of it can be told to be one."""
    if isinstance(model, Mapping):
        return _name(model["model"]["path"]) if isinstance(model.get("model"), Mapping) else str(model)
    text = os.path.expanduser(str(model))
    return os.path.realpath(text) if os.path.isdir(text) else text


def _one_value(value: Any) -> Any:
    """A parameter's value where it is one for all tensors: bare, or as command 2 writes it; else the value itself."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and {*value[0]} == {"value"}:
        return value[0]["value"]
    return value
