"""What is asked of a recipe, and all of it that can be settled before a measurement is looked at. Light to import."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from utils.errors import UserError
from utils.guidance.method import GuidanceMethod
from utils.pair.config import ModelEntry, PairConfig
from utils.recipes.global_parameters import check_global_parameters, known_parameters
from utils.recipes.method_rules import OWN_METHODS, DeltaMethod, density_method, weight_method
from utils.recipes.recipe import DTYPE
from utils.recipes.routers import RouterOption

_USUAL_DENSITY = 0.5  # of guidance that gives weights, with a method that needs a density


@dataclass(frozen=True)
class RecipeOptions:
    """What is asked of a recipe; None: the usual. `method_options` are the values of the guidance method's own flags."""

    method: GuidanceMethod
    method_options: Mapping[str, Any]
    merge_method: str | None = None
    mean_density: float | None = None
    lambda_: float | None = None
    dtype: str = DTYPE
    out_dtype: str | None = None
    router: RouterOption = None


@dataclass(frozen=True)
class RecipeChoices:
    """What is settled before a measurement is looked at.

    `asked` is the merge method asked for; `rule` the one that the recipe names, which keeps whole deltas where no density
    is wanted. `parameters` are the recipe's shared ones. `density` is the share of the measured parameters to keep, None
    where the guidance alone says it.
    """

    options: RecipeOptions
    experts: tuple[ModelEntry, ...]
    asked: DeltaMethod
    rule: DeltaMethod
    parameters: Mapping[str, Any]
    density: float | None

    @property
    def method(self) -> GuidanceMethod:
        """The guidance method."""
        return self.options.method


def settle(config: PairConfig, options: RecipeOptions) -> RecipeChoices:
    """Settle all that needs no measurement: the merge method, its parameters, the share to keep. Reads no file.

    Raises:
        UserError: the merge method does not exist or would not use the guidance; an option that would do nothing;
            global parameters that the method does not have; too few experts.
    """
    method = options.method
    asked = _asked_method(options)
    if options.mean_density is not None and not asked.keeps:
        raise UserError(
            f"--mean_density {options.mean_density} has no effect with --merge_method {asked.name}, which adds whole "
            "deltas; leave it out, or use ties, dare_ties or dare_linear",
            "flag-no-effect",
        )
    rule = method.merge_rule(asked, options.method_options)
    experts = config.experts_to_merge
    method.check_experts(config, len(experts))
    parameters = _parameters(config, method, rule)
    check_global_parameters(rule, parameters, f"pair config {config.path}")
    parameters |= {one.name: one.default for one in rule.numbers if one.is_written and one.name not in parameters}
    density = options.mean_density
    if density is None and method.gives == "weights" and rule.keeps:
        density = _USUAL_DENSITY
    if rule.whole and options.mean_density is None:
        rule = replace(rule, keeps="")
    return RecipeChoices(options, experts, asked, rule, parameters, density)


def _asked_method(options: RecipeOptions) -> DeltaMethod:
    name = options.method.merge_method if options.merge_method is None else options.merge_method
    if name in options.method.own_merge_methods:
        return OWN_METHODS[name]
    if options.method.gives == "weights":
        return weight_method(name)
    return density_method(name, options.method.own_merge_methods)


def _parameters(config: PairConfig, method: GuidanceMethod, rule: DeltaMethod) -> dict[str, Any]:
    """The config's `global_parameters`; weights are never divided by their sum, which would undo them.

    What only mergekit's methods know is left out for one of this project's.
    """
    parameters = dict(config.global_parameters)
    if method.gives == "weights":
        for name in ("density", "weight"):  # in a config that was made for another kind of guidance
            parameters.pop(name, None)
        parameters["normalize"] = False
    return known_parameters(rule, parameters) if rule.own else parameters
