"""From a measurement to a recipe as plain data, without files and prints: what command 2 writes and a search tries.

In order: `open_measured` (`measured_pair.py`) once: manifest, hashes, the models that are here; `settle`
(`recipe_choices.py`) once per recipe: all that is known without the measurement; `guided_recipe`: the recipe, the files
of vectors it names, doubts; `control_recipe`: the unguided recipe to compare it with; `recipe_files` (`recipe_files.py`):
their bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.measured_pair import MeasuredPair
from utils.guidance.method import DEFAULT
from utils.guidance.recipe_choices import RecipeChoices
from utils.pair.config import PairConfig
from utils.recipes.coefficients import lines_control, uniform_control
from utils.recipes.doubts import cancelled_weights, doubts
from utils.recipes.group_filters import group_filters
from utils.recipes.method_rules import counterpart
from utils.recipes.naming import NOT_HERE, Naming, filters_without_vectors
from utils.recipes.recipe import DTYPE, RecipeSettings, file_key, recipe, recipe_name
from utils.recipes.routers import RouterChoice, choose_routers, without_routers
from utils.recipes.saliency_vectors import open_vectors
from utils.recipes.stock import reason_against_stock


@dataclass(frozen=True)
class Control:
    """An unguided recipe with the guided one's means: its kind, file name, content, and the table it was made of.

    `only_here` is as in `GuidedRecipe`.
    """

    kind: str
    name: str
    data: Mapping[str, Any]
    table: pd.DataFrame
    warnings: tuple[str, ...] = ()
    only_here: str = ""


@dataclass(frozen=True)
class GuidedRecipe:
    """A recipe and what it is made of.

    `name` is its file name, `data` the YAML as plain data; `vectors` are the files it names beside itself, by file name.
    `warnings` are sentences. `only_here` says in a clause why stock mergekit does not run it, "" where it does. `aligned` are
    embeddings and heads for which it has no measurement, since they are aligned by token.
    """

    choices: RecipeChoices
    decision: Decision
    settings: RecipeSettings
    name: str
    data: Mapping[str, Any]
    warnings: tuple[str, ...]
    vectors: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    only_here: str = ""
    aligned: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What the names of the files beside the recipe begin with."""
        return self.name.removesuffix(".yaml")


def guided_recipe(
    measured: MeasuredPair, choices: RecipeChoices, name: str | None = None, *, folder: Path | None = None
) -> GuidedRecipe:
    """Make a recipe of a measurement.

    Args:
        measured: the opened dataframe folder, measured by the method of `choices`.
        choices: what was settled.
        name: the recipe's file name, after which the files of vectors are called too; None: named after the options.
        folder: where the recipe will lie, from where it names files of the measurement; None: by their whole paths.

    Raises:
        UserError: what the guidance method's *decide* half raises: tables that do not fit, filters that miss.
    """
    decision = choices.method.decide(
        DecideJob(
            config=measured.config,
            experts=choices.experts,
            folder=measured.folder,
            manifest=measured.manifest,
            models=measured.models,
            merge_method=choices.rule,
            options=choices.options.method_options,
            mean_density=choices.density,
        )
    )
    name = name or recipe_file_name(measured.config, choices, decision)
    stem = name.removesuffix(".yaml")
    vectors = {expert: f"{stem}_{expert}_saliency.safetensors" for expert in decision.vectors}
    files = {key: measured.folder / file for key, file in decision.measured.items()}
    apart = measured.models.vocabulary_apart if vectors or files else ()
    opened = [open_vectors(file) for file in files.values()]
    unmeasured = filters_without_vectors(measured.models.written, opened, apart)
    parameters = {**decision.parameters, **choices.parameters, **decision.fixed}
    routers = _routers(measured, choices, decision, parameters)
    decision = replace(decision, naming=without_routers(decision.naming, routers, measured.models.written))
    settings = RecipeSettings(
        method=choices.rule,
        base=measured.config.base,
        experts=choices.experts,
        parameters=parameters,
        as_weights=decision.writes_weights,
        as_factors=decision.writes_factors,
        expert_weights=decision.expert_weights,
        lambda_=_lambda(choices, decision),
        dtype=choices.options.dtype,
        out_dtype=choices.options.out_dtype,
        saliency=vectors | {key: file_key(file, folder) for key, file in files.items()},
        unmeasured=unmeasured,
        routers=routers,
    )
    return GuidedRecipe(
        choices=choices,
        decision=decision,
        settings=settings,
        name=name,
        data=recipe(decision.table, decision.naming, settings),
        warnings=(
            *decision.warnings,
            *decision.naming.warnings,
            *_of_apart(apart),
            *doubts(settings, decision.table, measured.models.checkpoints.values()),
        ),
        vectors={vectors[expert]: content for expert, content in decision.vectors.items()},
        only_here=reason_against_stock(settings.method, measured.models.written),
        aligned=apart,
    )


def _of_apart(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{', '.join(names)}: the models have different numbers of rows, which are aligned by token; what was measured of rows "
        "does not follow them, so they are merged without it"
    ]


def _lambda(choices: RecipeChoices, decision: Decision) -> float | None:
    """The factor that the recipe sets: the flag's; where neither that nor the pair config has one, the guidance's."""
    asked = choices.options.lambda_
    return decision.lambda_ if asked is None and "lambda" not in choices.parameters else asked


def _routers(
    measured: MeasuredPair, choices: RecipeChoices, decision: Decision, parameters: Mapping[str, Any]
) -> RouterChoice:
    asked = choices.options.router
    if decision.router is not None and asked not in (None, decision.router):
        raise UserError(
            f"--router {asked}: {measured.folder} was measured for --router {decision.router}; leave it out, or measure again "
            "from a recipe with that",
            "router-unfit",
        )
    recorded = (measured.manifest or {}).get("routers", ())
    return choose_routers(decision.router or asked, measured.models, recorded, choices.rule, parameters)


def recipe_file_name(config: PairConfig, choices: RecipeChoices, decision: Decision, control: str = "") -> str:
    """The released code's name where only its options are given; every other option that changes a recipe is in it."""
    options = choices.options
    given = {
        "mean": options.mean_density,
        "lambda": options.lambda_,
        "dtype_": None if options.dtype == DTYPE else options.dtype,
        "out_": options.out_dtype,
        "router_": options.router,
    }
    tags = [*decision.tags, *(f"{key}{value}" for key, value in given.items() if value is not None)]
    beside = decision.tags_beside if tags else ()
    tags += [
        *beside,
        *([] if choices.method.name == DEFAULT else [choices.method.name]),
        *([control] if control else []),
    ]
    return recipe_name(config.path, decision.numbers, choices.asked.name, tags)


def without_vectors(measured: MeasuredPair, made: GuidedRecipe) -> RecipeSettings:
    """A guided recipe's settings with mergekit's method in place of one of this project's."""
    settings, choices = made.settings, made.choices
    plain = replace(settings, as_factors=False, saliency={})
    method = counterpart(settings.method, choices.asked)
    if method is settings.method:
        return plain
    parameters = dict(measured.config.global_parameters)
    if settings.method.whole:  # a mean of deltas
        parameters = {name: value for name, value in parameters.items() if name == "lambda"} | {"normalize": False}
        parameters |= {method.extra: 0.0} if method.extra else {}
        share = 1 / len(choices.experts)
        routers = replace(settings.routers, weight=settings.routers.weight * share)  # a factor becomes a weight
        plain = replace(plain, weight=share, expert_weights={}, routers=routers)
    return replace(plain, method=method, parameters=parameters)


def control_recipe(measured: MeasuredPair, made: GuidedRecipe, kind: str) -> Control:
    """The unguided recipe of a kind (`uniform` or `lines`) with the means of a guided one.

    For a method of this project's it names mergekit's that does the same without vectors.

    Raises:
        UserError: tensor sizes are not known.
    """
    settings, choices, plain = made.settings, made.choices, without_vectors(measured, made)
    plain = replace(plain, as_weights=plain.as_weights or kind == "lines")
    guided = made.decision.table
    # the weights of what averages are shares of a mean, and factors of it
    guided = guided.assign(weight=plain.weight if settings.method.averages else guided["weight"] * plain.weight)
    table = uniform_control(guided) if kind == "uniform" else lines_control(guided)
    name = recipe_file_name(measured.config, choices, made.decision, kind)
    cancelled = "" if cancelled_weights(settings, "") else cancelled_weights(plain, "the control's weights")
    data = recipe(table, _naming_weights(measured, made, plain, table), plain)
    only_here = reason_against_stock(plain.method, measured.models.written)
    return Control(kind, name, data, table, (cancelled,) if cancelled else (), only_here)


def _naming_weights(measured: MeasuredPair, made: GuidedRecipe, plain: RecipeSettings, table: pd.DataFrame) -> Naming:
    """The guided recipe's names, with filters for a control's weights where that has none."""
    naming, written = made.decision.naming, measured.models.written
    if naming.filters or naming.group_filters is not None or not plain.as_weights:
        return naming
    names = list(naming.params) if written is None else written.names
    where = NOT_HERE if written is None else written.where
    return replace(naming, group_filters=weight_filters(table, plain.routers, names, where))


def weight_filters(
    table: pd.DataFrame,
    routers: RouterChoice,
    names: Sequence[str],
    where: str,
    tied: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Filters for the tensors of a table, routers aside, that share those whose weights are alike in every expert.

    Args:
        table: the coefficients.
        routers: those that have filters of their own, before all others.
        names: every name that filters will be matched on.
        where: the models, for a message.
        tied: other names that take the weights of tensors, with theirs.

    Raises:
        UserError: no filters can tell the tensors apart.
    """
    without = set(routers.tensors)
    by_tensor = {tensor: tuple(map(float, own["weight"])) for tensor, own in table.groupby("tensor", sort=False)}
    by_tensor |= {other: by_tensor[tensor] for other, tensor in tied.items()}
    groups = {tensor: weights for tensor, weights in by_tensor.items() if tensor not in without}
    return group_filters(groups, [name for name in names if name not in without], where)
