"""A point of the space -> the recipe as plain data. Nothing is printed; only files of vectors are written, once each."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import UserError, is_of_the_moment
from utils.guidance.guided_recipe import GuidedRecipe, guided_recipe
from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.method import guidance_methods
from utils.guidance.portable_recipe import portable_recipe
from utils.guidance.recipe_choices import RecipeOptions, settle
from utils.pair.config import PairConfig
from utils.publishing.files import publish_files
from utils.recipes.coefficients import COLUMNS, mean_density
from utils.recipes.global_parameters import known_parameters
from utils.recipes.group_filters import group_filters
from utils.recipes.method_rules import DENSITY_METHODS, OWN_METHODS, WEIGHT_METHODS, extra_value
from utils.recipes.naming import LocalModels, Naming
from utils.recipes.recipe import RecipeSettings, recipe, renamed_files
from utils.recipes.routers import RouterChoice, in_stock_mergekit, usual_routers
from utils.recipes.stock import StockNames, models_against_stock, stock_names
from utils.searching.factors import Blocks, by_depth, lines_factors, spread, weighed
from utils.searching.points import DENSITY, LAMBDA, LINES, Point, Way

VECTORS = "vectors"
_DTYPE = "float32"


@dataclass(frozen=True)
class Made:
    """A recipe: `data` as the scorer takes it, files of vectors being named by their whole paths (`vectors`); `stock` if
    any mergekit runs it, not this project's command 3 alone; `note` is what its first line is to say; `fused` if its filters
    are for stacked experts; `same` if it merges to the tensors that its point's own recipe does."""

    data: Mapping[str, Any]
    stock: bool
    vectors: tuple[Path, ...] = ()
    note: str = ""
    fused: bool = False
    same: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 of what the recipe does: its data, where files of vectors are called by their content."""
        return hashlib.sha256(repr(self.data).encode()).hexdigest()


@dataclass
class RecipeMaker:
    """Makes recipes of points, each measurement being opened once.

    Args:
        config: the pair config.
        models: the models that lie on this machine.
        measured: the opened measurements by guidance.
        folder: where files of vectors go, called by their content.
        out_dtype: torch name of what merged weights are rounded to, the base's own. Merges compute in float32: in
            bfloat16 the small changes of a fine-tune would be rounded before they are added.
    """

    config: PairConfig
    models: LocalModels
    measured: Mapping[str, MeasuredPair]
    folder: Path
    out_dtype: str
    _written: dict[str, Path] = field(default_factory=dict, repr=False)

    @cached_property
    def routers(self) -> RouterChoice:
        """What unguided recipes do with a mixture's routers: what guided ones do.

        Raises:
            UserError: the models cannot be merged.
        """
        return usual_routers(self.models)

    @cached_property
    def blocks(self) -> Blocks:
        """The decoder blocks as filters see them.

        Raises:
            UserError: the base is not on this machine, or no filters tell its blocks apart.
        """
        return find_blocks(self.models)

    def for_stock(self, point: Point) -> Made | str:
        """The recipe that stock mergekit runs for a point: its own, or one by stock mergekit's names, where those are others
        than here (it stacks a mixture's experts); else a clause that says why there is none.

        An unguided one is the same by other names, unless its method keeps a share of each tensor; of what guides each
        expert by itself stock mergekit can have the means (`utils/guidance/portable_recipe.py`).

        Raises:
            UserError: as `make`.
        """
        made = self.make(point)
        if made.stock:
            return made
        if point.merge_method in OWN_METHODS:
            return f"mergekit-yaml does not know {point.merge_method}, which is this project's"
        try:
            stock = stock_names(self.models)
            maker = replace(self)
            maker.routers = in_stock_mergekit(self.routers, stock)
            if point.guidance == LINES or point.depth:
                maker.blocks = find_blocks(self.models, stock)
            data = maker._portable(point) if point.guidance in self.measured else maker.make(point).data
        except (
            UserError
        ) as error:  # it cannot merge these models, would lose tensors of theirs, or have some by no filter
            if is_of_the_moment(error):
                raise
            return models_against_stock(self.models.written)
        fused = any(name != other for name, other in stock.by_own.items())
        guided = point.guidance in self.measured
        same = not guided and not (fused and point.merge_method in DENSITY_METHODS)
        note = "for stock mergekit-yaml, and utils/merger.py" + (" --fused_experts" if fused else "")
        if guided:
            note += ", with the mean of what guides the experts of a stack; what was scored guides each on its own"
        elif not same:
            note += ", which cut each stack of experts as one; what was scored cuts each expert on its own"
        return Made(data, True, note=note, fused=fused, same=same)

    def _portable(self, point: Point) -> dict[str, Any]:
        """A guided point's recipe with one number for each tensor that stock mergekit has."""
        made = portable_recipe(self.measured[point.guidance], self._decided(point))
        return self._with_factors(dict(made.data), point)

    def make(self, point: Point) -> Made:
        """The recipe of a point.

        Raises:
            UserError: what the guidance method or the merge method refuses.
        """
        if point.guidance in self.measured:
            data, vectors = self._guided(point)
        else:
            data, vectors = self._unguided(point), ()
        data = self._with_factors(data, point)
        stock = data["merge_method"] not in OWN_METHODS and not models_against_stock(self.models.written)
        return Made(data, stock, vectors)

    def _with_factors(self, data: dict[str, Any], point: Point) -> dict[str, Any]:
        """A recipe with the factors that a point has for experts and depth."""
        if point.guidance == LINES:
            data = by_depth(data, lines_factors(len(self.blocks.filters)), self.blocks)
        if point.weights:
            experts = [entry.type for entry in self.config.experts_to_merge]
            data = weighed(data, [point.weights[name] for name in experts])
        if point.depth:
            data = by_depth(data, spread(point.depth, len(self.blocks.filters)), self.blocks)
        return data

    def default(self, way: Way) -> Point:
        """A guided way at its defaults, all numbers said."""
        made = self._decided(Point(way.merge_method, way.guidance, dict.fromkeys(way.numbers)))
        flags = {flag.name: flag.default for flag in made.choices.method.decide_flags}
        table = made.decision.table
        known = {
            LAMBDA: float(made.data["parameters"].get("lambda", 1.0)),
            DENSITY: made.choices.density or mean_density(table[table["component"] != ""]),
            **{name: value for name, value in flags.items() if name in way.numbers},
            **{
                name: made.data["parameters"].get(name) for name in way.numbers if name not in (LAMBDA, DENSITY, *flags)
            },
        }
        options = {name: flags[name] for name in way.choices}
        return Point(way.merge_method, way.guidance, {name: known[name] for name in way.numbers}, options)

    def _decided(self, point: Point) -> GuidedRecipe:
        method = guidance_methods()[point.guidance]
        flags = {flag.name: flag.default for flag in method.decide_flags}
        given = {name: value for name, value in point.numbers.items() if name in flags and value is not None}
        options = RecipeOptions(
            method=method,
            method_options={**flags, **point.options, **given},
            merge_method=point.merge_method,
            mean_density=point.numbers.get(DENSITY),
            lambda_=point.numbers.get(LAMBDA),
            dtype=_DTYPE,
            out_dtype=self.out_dtype,
        )
        return guided_recipe(self.measured[point.guidance], settle(self.config, options), name=f"{point.guidance}.yaml")

    def _guided(self, point: Point) -> tuple[dict[str, Any], tuple[Path, ...]]:
        made = self._decided(point)
        data = dict(made.data)
        shared = {one.name for one in made.settings.method.numbers if one.name != LAMBDA}
        given = {name: value for name, value in point.numbers.items() if name in shared and value is not None}
        data["parameters"] = {**data["parameters"], **given}
        places = {name: self._kept(name, content) for name, content in made.vectors.items()}
        data["models"] = [_with_vectors(entry, places) for entry in data["models"]]
        return data, tuple(places.values())

    def _kept(self, name: str, content: bytes) -> Path:
        """Where a file of vectors lies, written if it is new; its name says its content."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._written:
            path = self.folder / f"{digest[:24]}{Path(name).suffix}"
            if not path.exists():
                publish_files(self.folder, {path.name: content}, overwrite=True)
            self._written[digest] = path.resolve()
        return self._written[digest]

    def _unguided(self, point: Point) -> dict[str, Any]:
        """The same for all tensors: weight 1 and, where the method keeps a share, one density."""
        rule = {**DENSITY_METHODS, **WEIGHT_METHODS}[point.merge_method]
        given = known_parameters(rule, self.config.global_parameters)
        normalize = {} if rule.keeps else {"normalize": False}  # what only adds would be an average otherwise
        parameters = {
            name: value for name, value in given.items() if name in rule.shared and name != LAMBDA
        } | normalize
        settings = RecipeSettings(
            method=replace(rule, extra=""),
            base=self.config.base,
            experts=self.config.experts_to_merge,
            parameters=parameters,
            lambda_=point.numbers[LAMBDA],
            dtype=_DTYPE,
            out_dtype=self.out_dtype,
            routers=self.routers,
        )
        data = recipe(_no_rows(), Naming({}, {}, {}, None, ""), settings)
        if rule.keeps:
            for entry in data["models"][1:]:
                entry["parameters"]["density"] = [{"value": point.numbers[DENSITY]}]
                entry["parameters"] |= _extra(rule, float(point.numbers[DENSITY] or 0.0))
        return data


def find_blocks(models: LocalModels, stock: StockNames | None = None) -> Blocks:
    """The decoder blocks of the models to merge, and filters for them, by their names here or by those of stock mergekit.

    Raises:
        UserError: the base is not on this machine, its blocks cannot be found or told apart.
    """
    from utils.models.decoder import find_decoder
    from utils.models.weight_source import build_skeleton

    written = models.written
    if written is None:
        raise UserError(
            "the base model is not on this machine, so its blocks are not known; download it first (hf download)",
            "search-base-not-here",
        )
    import torch

    skeleton = build_skeleton(written.base, torch.float32, models.trust_remote_code)
    decoder = find_decoder(skeleton, (), {}, written.where)
    groups, names = {}, written.names
    there = set(names)
    for layer in range(len(decoder.blocks)):
        prefix = f"{decoder.blocks_path}.{layer}."
        for name, planned in written.plan.spellings.items():
            if name.startswith(prefix) and planned in there:
                groups[planned] = layer
    if stock is not None:
        groups, names = {stock.by_own[name]: layer for name, layer in groups.items()}, stock.tensors
    filters = group_filters(groups, names, written.where)
    by_layer: dict[int, list[str]] = {}
    for name, text in filters.items():
        if text not in by_layer.setdefault(groups[name], []):
            by_layer[groups[name]].append(text)
    if any(len(texts) > 1 for texts in by_layer.values()) or len(by_layer) != len(decoder.blocks):
        raise UserError(
            f"{written.where}: no one filter hits a whole block; set search.depth_groups: 1 and leave out guidance lines",
            "search-depth-filter",
        )
    return Blocks(tuple(by_layer[layer][0] for layer in sorted(by_layer)), tuple(names))


def _extra(rule: Any, density: float) -> dict[str, Any]:
    return {rule.extra: [{"value": extra_value(rule, density, rule.extra_default)}]} if rule.extra else {}


def _with_vectors(entry: Mapping[str, Any], places: Mapping[str, Path]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if "saliency" not in parameters:
        return dict(entry)
    # a file of the measurement's own keeps its place
    named = renamed_files(parameters["saliency"], lambda file: str(places.get(file, file)))
    return {**entry, "parameters": {**parameters, "saliency": named}}


def _no_rows() -> Any:
    return pd.DataFrame({name: [] for name in COLUMNS})
