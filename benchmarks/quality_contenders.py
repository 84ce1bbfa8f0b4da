"""What the quality benchmark compares: for each contender, the recipes among which validation chooses.

A guided recipe comes from command 2's own function. An unguided one is written here, with one value for all tensors, or
values that depend on depth alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality_pairs import Pair, measured, recipe_of

BUDGETS = (0.05, 0.1, 0.2, 0.4)
ORDINALS = {2: "second", 3: "third"}  # rounds of gram_mean
RIDGES = (1e-7, 1e-5, 1e-4)  # of gram_mean; larger ones lose, and so does a lambda below 1 (docs/quality.md)
START = "tuned_start"  # in a pair's folder: what coefficients were tuned from
UNIFORM_ONE = "uniform"
UNIFORM_TWO = "uniform task arithmetic"
CONTROLS = {"one expert": UNIFORM_ONE, "two experts": UNIFORM_TWO, "three experts": UNIFORM_TWO}


@dataclass(frozen=True)
class Choice:
    """Which contenders and budgets of one expert are run, beside the controls; None: all there are."""

    contenders: tuple[str, ...] | None = None
    budgets: tuple[float, ...] | None = None

    def of(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The chosen ones among some contenders."""
        controls = CONTROLS.values()
        wanted = None if self.contenders is None else {*self.contenders, *controls}
        return {name: one for name, one in named.items() if wanted is None or name in wanted}


EVERYTHING = Choice()


@dataclass(frozen=True)
class Variant:
    """One setting of a contender; `recipe` makes its recipe for a pair, measuring on `device` if need be."""

    setting: str
    recipe: Callable[[Pair, str], Path]


def guided(
    guidance: str, config: str = "both", number: int = 0, shared: Mapping[str, Any] | None = None, **flags: Any
) -> Variant:
    """What command 2 makes of a method and flags; `number` 1 is the control it writes beside.

    `shared` are parameters of the merge method that a user would put under `global_parameters`.
    """

    def recipe(pair: Pair, device: str) -> Path:
        place = pair.both if config == "both" else pair.alone[config]
        return _with_shared(recipe_of(pair, place, guidance, flags, device)[number], shared)

    shown = {key: value for key, value in flags.items() if key not in ("merge_method", "control")} | (shared or {})
    return Variant(_setting(shown), recipe)


def _with_shared(recipe: Path, shared: Mapping[str, Any] | None) -> Path:
    if shared:
        data = yaml.safe_load(recipe.read_text())
        data["parameters"] |= shared
        recipe.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return recipe


def in_rounds(
    count: int, shared: Mapping[str, Any] | None = None, measure: Mapping[str, Any] | None = None, **flags: Any
) -> Variant:
    """gram_mean in so many rounds; `shared` as for `guided`, of the last merge alone; `measure`: flags of command 1."""

    def recipe(pair: Pair, device: str) -> Path:
        name = _named("gram_mean", *([ORDINALS[count]] if count > 1 else []), **(measure or {}))
        folder = measured(pair, "gram_mean", device, name, rounds=count, **(measure or {}))
        return _with_shared(recipe_of(pair, pair.both, "gram_mean", flags, device, folder)[0], shared)

    return Variant(_setting(flags | (shared or {})), recipe)


def tuned(start: Variant | None, measure: Mapping[str, Any] | None = None) -> Variant:
    """Coefficients by gradient, from a variant of gram_mean, or from the plain mean; `measure`: flags of command 1."""

    def recipe(pair: Pair, device: str) -> Path:
        flags = dict(measure or {})
        name = _named("tuned", *([] if start is None else ["gram_mean"]), **flags)
        if start is not None:
            flags["start_recipe"] = str(_kept(start.recipe(pair, device)))
        folder = measured(pair, "tuned", device, name, **flags)
        method = {} if start is None else {"merge_method": "gram_mean"}
        return recipe_of(pair, pair.both, "tuned", method, device, folder)[0]

    return Variant(_setting(measure or {}) or ("" if start is None else start.setting), recipe)


def _named(*words: str, **flags: Any) -> str:
    """What to call a measurement with flags that are not the defaults."""
    return "_".join([*words, *(f"{key}_{value}" for key, value in flags.items())])


def _setting(flags: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in flags.items())


def _kept(recipe: Path) -> Path:
    """A copy that the next recipe of that name does not replace, as deep: it names its vectors from where it lies."""
    copy = recipe.parent.with_name(START) / recipe.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(recipe.read_bytes())
    return copy


def one_expert(task: str, budget: float) -> dict[str, Variant]:
    """The contenders at a budget: the share of the entries of the measured tensors that are kept."""
    keep = {"config": task, "mean_density": budget}
    return {
        UNIFORM_ONE: guided("lewis", number=1, control="uniform", **keep),
        "LEWIS minmax": guided("lewis", control="uniform", **keep),
        "LEWIS clip": guided("lewis", bound="clip", **keep),
        "saliency budget": guided("saliency_budget", **keep),
        "saliency mask": guided("saliency_budget", mask="saliency", **keep),
        "saliency mask, refitted": guided("gram_mean", shared={"joint_support": False}, **keep),
        "joint support, refitted": guided("gram_mean", **keep),
        "low rank, by inputs": guided("gram_mean", form="low_rank", **keep),
    }


def two_experts() -> dict[str, list[Variant]]:
    """The contenders, each with the settings among which validation chooses."""
    cuts = list(product((0.2, 0.5), (0.1, 0.2, 0.35)))
    cut = [{"mean_density": density, "lambda": scale} for density, scale in cuts]
    linearity = {
        f"submodule linearity, {level}": [
            guided("submodule_linearity", level=level, ridge=ridge) for ridge in (1e-6, 0.1)
        ]
        for level in ("block", "attention_mlp", "tensor")
    }
    return {
        UNIFORM_TWO: [plain("task_arithmetic", weight=weight) for weight in (0.2, 0.3, 0.4, 0.5, 0.6)],
        "uniform TIES": [plain("ties", weight=1.0, density=d, scale=s, normalize=True) for d, s in cuts],
        "uniform TIES, not divided": [plain("ties", weight=1.0, density=d, scale=s) for d, s in cuts],
        "uniform DARE-TIES": [plain("dare_ties", weight=w, density=d) for w in (0.2, 0.35, 0.5) for d in (0.5, 0.8)],
        "LiNeS": [lines(first, growth) for first in (0.1, 0.2, 0.3) for growth in (0.2, 0.4)],
        "Sens-Merging": [
            guided("sens_merging", **{"lambda": scale, "temperature": temperature})
            for scale in (0.2, 0.3, 0.4)
            for temperature in (1.0, 0.2)
        ],
        **linearity,
        "LEWIS": [guided("lewis", **flags) for flags in cut],
        "saliency budget": [guided("saliency_budget", **flags) for flags in cut],
        "saliency mask": [guided("saliency_budget", mask="saliency", **flags) for flags in cut],
        "saliency mean": [
            guided("saliency_budget", merge_method="guided_mean", shared=shared, **{"lambda": scale})
            for scale in (0.85, 1.0)
            for shared in ({"power": 0.5, "floor": 0.1}, {"power": 1.0, "floor": 0.0})
        ],
        "gram mean": [guided("gram_mean", shared={"ridge": ridge}, **{"lambda": 1.0}) for ridge in RIDGES],
        "gram mean, embeddings by the guided mean": [guided("gram_mean", shared={"embedding_rows": False})],
        "gram mean, second round": [in_rounds(2, {"ridge": ridge}, **{"lambda": 1.0}) for ridge in RIDGES],
        "tuned coefficients": [tuned(None)],
        "gram mean, second round, tuned": [tuned(in_rounds(2, **{"lambda": 1.0}))],
        "gram mean, third round": [in_rounds(3, **{"lambda": 1.0})],
    }


def unguided(method: str) -> Variant:
    """A method of mergekit's that sets its own weights."""
    return Variant("", lambda pair, device: _written(pair, method, method, lambda layers: {}, {}))


def plain(
    method: str, *, weight: float, density: float | None = None, scale: float | None = None, normalize: bool = False
) -> Variant:
    """An unguided recipe: one weight and one density for all tensors of all experts."""

    def parameters(layers: int) -> Mapping[str, Any]:
        # As in guided recipes the density holds in the linear parts of the blocks; all else keeps everything.
        cut = {} if density is None else {"density": [{"filter": "proj", "value": density}, {"value": 1}]}
        return {**cut, "weight": weight}

    shown = {"weight": weight, "density": density, "lambda": scale, "normalize": normalize or None}
    setting = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    shared = {"normalize": normalize, **({} if scale is None else {"lambda": scale})}
    return Variant(setting, lambda pair, device: _written(pair, method, setting, parameters, shared))


def lines(first: float, growth: float) -> Variant:
    """LiNeS (arXiv 2410.17146): task arithmetic whose weight grows from `first` by `growth` over the depth."""

    def parameters(layers: int) -> Mapping[str, Any]:
        weights = [first + growth * layer / (layers - 1) for layer in range(layers)]
        filters = [{"filter": f"model.layers.{layer}.", "value": weight} for layer, weight in enumerate(weights)]
        return {"weight": [*filters, {"filter": "model.norm", "value": first + growth}, {"value": first}]}

    setting = f"weight {first} to {first + growth:g}"
    return Variant(
        setting,
        lambda pair, device: _written(pair, "task_arithmetic", f"lines {setting}", parameters, {"normalize": False}),
    )


def _written(
    pair: Pair,
    method: str,
    setting: str,
    parameters: Callable[[int], Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> Path:
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(pair.trained.base).num_hidden_layers
    experts = [{"model": str(path), "parameters": dict(parameters(layers))} for path in pair.trained.experts.values()]
    recipe = {
        "models": [{"model": str(pair.trained.base)}, *experts],
        "merge_method": method,
        "base_model": str(pair.trained.base),
        "parameters": dict(shared),
        "dtype": "bfloat16",
    }
    path = pair.folder / "recipes" / f"{method} {setting}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
