"""The recipe that tuning starts from: one merge method, one weight for each expert, and what its files are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.errors import Problem, UserError, raise_collected
from utils.guidance.tuned.method import METHODS
from utils.merging.recipe_file import MergeRecipe, checked_recipe, read_recipe
from utils.pair.config import ModelEntry
from utils.publishing.manifest import file_sha256
from utils.recipes.matching import FilterList
from utils.recipes.method_rules import TASK_ARITHMETIC, is_number
from utils.recipes.naming import LocalModels
from utils.recipes.recipe import model_key, recipe_bytes
from utils.recipes.recipe_manifest import refuse_changed_files
from utils.recipes.routers import BASE, MERGE, choose_routers, share_routers

_MODEL_KEYS = {"weight", "saliency"}
_WEIGHT = (
    "weight must be one number for all tensors, of which routers alone may be left to the base; make the recipe by guidance "
    "with one weight for each expert, with --router base or --router merge"
)


@dataclass(frozen=True)
class Start:
    """A merge that is a sum of parts, one for each expert.

    `weights` are those of the recipe by expert type, `saliency` the absolute paths of the files that its method reads ("" where
    they are to be measured yet), none for plain changes, and `sha256` these files' hashes: coefficients hold for the parts that
    were made of them.
    `parameters` are the shared ones. `routers` are filters of a mixture's routers, which stay the base's, and `router` what
    the recipe does with them, as `--router` says it (None: nothing special). `unmeasured` are filters of tensors with or
    without the files, before all others.
    """

    merge_method: str
    parameters: Mapping[str, Any]
    weights: Mapping[str, float]
    saliency: Mapping[str, str]
    sha256: Mapping[str, str] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    router: str | None = None
    unmeasured: tuple[tuple[str, bool], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the parts are the changes themselves, so that a coefficient is a factor of the weight."""
        return self.merge_method == TASK_ARITHMETIC.name

    def reading(self, files: Mapping[str, str]) -> "Start":
        """The same with the files under these names, by expert type."""
        return replace(self, saliency=dict(files))

    def part_recipe(self, base: ModelEntry, experts: Sequence[ModelEntry], kept: str) -> MergeRecipe:
        """The recipe, in float32, that adds the part of one expert alone."""
        models: list[dict[str, Any]] = [{"model": model_key(base)}]
        for entry in experts:
            factor = 1.0 if entry.type == kept else 0.0
            weight = self.weights[entry.type] * (factor if self.is_plain else 1.0)
            routers = [{"filter": text, "value": 0.0} for text in self.routers]
            own: dict[str, Any] = {"weight": [*routers, {"value": weight}] if routers else weight}
            if not self.is_plain:
                own["factor"] = factor
            if (file := self.saliency.get(entry.type)) is not None:
                places = [{"filter": text, "value": file if has else ""} for text, has in self.unmeasured]
                own["saliency"] = [*places, {"value": file}] if places else file
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


def plain_start(experts: Sequence[ModelEntry], models: LocalModels | None = None) -> Start:
    """The plain mean of the experts' changes; where `models` are mixtures, with their routers as a recipe has them that says
    nothing of them."""
    weights, parameters = {entry.type: 1 / len(experts) for entry in experts}, {"normalize": False}
    found = Start(TASK_ARITHMETIC.name, parameters, weights, {})
    if models is None or not models.routers:
        return found
    routers = choose_routers(None, models, (), TASK_ARITHMETIC, parameters).filters
    return replace(found, routers=routers, router=BASE if routers else None)


def read_start(path: Path, base: ModelEntry, experts: Sequence[ModelEntry], models: LocalModels | None = None) -> Start:
    """Read a recipe to start from.

    Args:
        path: the recipe.
        base: the pair's base.
        experts: those to merge, each of which the recipe must name once.
        models: them, to tell which filters are those of routers; None: none are.

    Raises:
        UserError: it cannot be read, merges other models, is no sum of parts with one weight each, or reads files that it
            was not made of. All problems of a kind are in the one message.
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
    routers: set[tuple[str, ...]] = set()
    unmeasured: set[tuple[tuple[str, bool], ...]] = set()
    for name, type_ in wanted.items():
        own = found[name]
        problems += [
            Problem(f"{name}: {key} cannot be kept; leave it out", "tuned-start-parameter")
            for key in own
            if key not in _MODEL_KEYS and not (key in ("density", "factor") and _one_value(own[key]) == 1)
        ]
        kept, rest = _parted(own.get("weight", parameters.get("weight")))
        weights[type_] = rest
        routers.add(tuple(text for text, _ in kept))
        if not is_number(rest) or any(value != 0 for _, value in kept):
            problems.append(Problem(f"{name}: {_WEIGHT}", "tuned-start-weight"))
        kept, file = _parted(own.get("saliency"))
        unmeasured.add(tuple((text, bool(value)) for text, value in kept))
        if any(value not in ("", file) for _, value in kept) or not isinstance(file, (str, type(None))):
            problems.append(Problem(f"{name}: saliency must be one file for all tensors", "tuned-start-parameter"))
        elif file:
            saliency[type_] = os.path.abspath(os.path.expanduser(recipe.locate(file)))
    raise_collected(problems, where)
    if len(routers) > 1 or len(unmeasured) > 1:
        raise UserError(f"{where}: its models have other filters each; give all the same", "tuned-start-weight")
    (filters,), (without,) = routers, unmeasured
    router = _router(filters, models, f"{where}: {_WEIGHT}")
    if absent := [file for file in saliency.values() if not os.path.isfile(file)]:
        raise UserError(
            f"{where}: it reads {absent[0]}, which is not there; keep the dataframe folder where the recipe found it, or "
            "measure and make the recipe again",
            "vectors-missing",
        )
    refuse_changed_files(
        path,
        {
            _parted(found[name]["saliency"])[1]: Path(saliency[type_])
            for name, type_ in wanted.items()
            if type_ in saliency
        },
    )
    return Start(data["merge_method"], parameters, weights, saliency, _hashes(saliency), filters, router, without)


def refuse_changed_parts(start: Start, where: Path) -> None:
    """Raise a `UserError` if a file that the parts were made of is not there any more, or is another one."""
    for type_, file in start.saliency.items():
        if not os.path.isfile(file) or file_sha256(Path(file)) != start.sha256.get(type_):
            state = "is another file now" if os.path.isfile(file) else "is not there any more"
            raise UserError(
                f"dataframe folder {where}: {file}, which the tuned recipe reads for {type_}, {state}, and the coefficients "
                "hold for what it was; put it back there, or tune again (lewis_importance.py --guidance tuned)",
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
    filtered, rest = _parted(value)
    return value if filtered else rest


def _parted(value: Any) -> tuple[list[tuple[str, Any]], Any]:
    """A parameter's values under filters, and the one of all others; one that is written in no such way is that of all."""
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return [], value
    if {*value[-1]} != {"value"} or any({*one} != {"filter", "value"} for one in value[:-1]):
        return [], value
    return [(str(one["filter"]), one["value"]) for one in value[:-1]], value[-1]["value"]


def _router(filters: Sequence[str], models: LocalModels | None, otherwise: str) -> str | None:
    """What a recipe with these filters of weight 0 does with routers.

    Raises:
        UserError: it keeps something else of the base, or not all routers; says `otherwise`.
    """
    routers = () if models is None else models.routers
    names = [] if models is None or models.written is None else models.written.names
    found = FilterList(list(filters))
    if {name for name in names if found.place(name) is not None} != (set(routers) if filters else set()) or (
        filters and not routers
    ):
        raise UserError(otherwise, "tuned-start-weight")
    if filters:
        return BASE
    differ = routers and not share_routers(models.written, routers, models.checkpoints)
    return MERGE if differ else None
