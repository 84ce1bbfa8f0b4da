"""Coefficients -> the YAML recipe that mergekit runs, in the released code's order and keys.

models: the base, then each expert with `density` and `weight` lists of {filter, value}, a bare value last
merge_method, base_model, parameters (the pair config's global_parameters), dtype, tokenizer_source
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from utils.errors import UserError
from utils.models.checkpoints import is_local
from utils.models.low_rank import adapter_name
from utils.pair.config import ModelEntry
from utils.recipes.method_rules import DeltaMethod, extra_value
from utils.recipes.naming import Naming, Unmeasured
from utils.recipes.routers import RouterChoice

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("uniform", "lines")  # unguided recipes to compare with (`utils/recipes/coefficients.py`)
DTYPES = ("float32", "bfloat16", "float16")
DTYPE = "bfloat16"  # as the released code writes it
_TOKENIZER_SOURCE = "union"
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class RecipeSettings:
    """What a recipe says beside the coefficients.

    `parameters` are the global ones, `lambda_` and `out_dtype` None where the user gave none. `as_weights` writes the
    coefficients' weights per tensor; what they do not cover, and everything otherwise, has `weight`, or the expert's own
    in `expert_weights` (by type). `as_factors` writes them as factors of the changes alone instead. `dtype` is what the
    merge computes in. `saliency` names the file of saliency vectors by expert type, for the method that reads them: a path
    relative to the recipe's folder, or an absolute one; `unmeasured` has the filters of tensors that it has none of.
    `routers` have a weight of their own, before all others; in a method that averages one above 0 is a factor instead.
    """

    method: DeltaMethod
    base: ModelEntry
    experts: tuple[ModelEntry, ...]
    parameters: Mapping[str, Any]
    as_weights: bool = False
    as_factors: bool = False
    weight: float = 1
    expert_weights: Mapping[str, float] = field(default_factory=dict)
    lambda_: float | None = None
    dtype: str = DTYPE
    out_dtype: str | None = None
    saliency: Mapping[str, str] = field(default_factory=dict)
    unmeasured: Unmeasured = field(default_factory=Unmeasured)
    routers: RouterChoice = field(default_factory=RouterChoice)


def recipe(coefficients: "pd.DataFrame", naming: Naming, settings: RecipeSettings) -> dict[str, Any]:
    """The recipe as plain data, keys in order.

    Args:
        coefficients: the table of `utils/recipes/coefficients.py`.
        naming: the filters by tensor name, in the order of the recipe.
        settings: everything else.
    """
    models: list[dict[str, Any]] = [{"model": model_key(settings.base)}]
    for expert in settings.experts:
        rows = coefficients[coefficients["model"] == expert.type]
        by_tensor = dict(zip(rows["tensor"], map(float, rows["density"]), strict=True))
        dense = [tensor for tensor in naming.filters if tensor in by_tensor]
        texts, density = [naming.filters[tensor] for tensor in dense], [by_tensor[tensor] for tensor in dense]
        parameters = {}
        if settings.method.keeps:
            parameters["density"] = [*_all(naming.before, 1.0), *_conditional(texts, density), {"value": 1}]
        others = rows[~rows["tensor"].isin(settings.routers.tensors)]
        own = settings.expert_weights.get(expert.type, settings.weight)
        weights = _weights(others, naming, own) if settings.as_weights else []
        routers = _all(settings.routers.filters, settings.routers.weight)
        of_change = bool(settings.routers.weight) and settings.method.averages
        parameters["weight"] = [*([] if of_change else routers), *weights, {"value": own}]
        if settings.as_factors or (of_change and routers):
            factors = _weights(others, naming, 1.0) if settings.as_factors else []
            parameters["factor"] = [*(routers if of_change else []), *factors, {"value": 1.0}]
        if expert.type in settings.saliency:
            file = settings.saliency[expert.type]
            before = [{"filter": text, "value": file} for text in settings.unmeasured.before]
            unmeasured = [{"filter": text, "value": ""} for text in settings.unmeasured.filters]
            parameters["saliency"] = [*before, *unmeasured, {"value": file}] if unmeasured else file
        if settings.method.extra:
            name = settings.method.extra
            wanted = float(settings.parameters.get(name, settings.method.extra_default))
            values = [extra_value(settings.method, value, wanted) for value in density]
            parameters[name] = [*_all(naming.before, wanted), *_conditional(texts, values), {"value": wanted}]
        models.append({"model": model_key(expert), "parameters": parameters})
    shared = dict(settings.parameters)
    if settings.lambda_ is not None:
        shared["lambda"] = settings.lambda_
    result = {
        "models": models,
        "merge_method": settings.method.name,
        "base_model": model_key(settings.base),
        "parameters": shared,
        "dtype": settings.dtype,
    }
    if settings.out_dtype is not None:
        result["out_dtype"] = settings.out_dtype
    return {**result, "tokenizer_source": _TOKENIZER_SOURCE}


def recipe_bytes(data: Mapping[str, Any], note: str = "") -> bytes:
    """The recipe as a YAML file, byte for byte as the released code writes it, after a note as a comment if there is one."""
    return (f"# {' '.join(note.split())}\n" if note else "").encode() + yaml.dump(dict(data), sort_keys=False).encode()


def model_key(entry: ModelEntry) -> str | dict[str, Any]:
    """How a recipe names a model: its name as in the pair config, `name@revision`, `model+adapter`, or mergekit's long form.

    mergekit reads '+' and '@' in a plain name as an adapter and a revision, so a folder whose name holds one is spelled
    out. `~` is expanded, which mergekit does not do.
    """
    parts = adapter_name(entry.name)
    if parts is None:
        return _own_key(entry.name, entry.revision)
    return _with_adapter(_own_key(parts.model, entry.revision), _own_key(parts.adapter, None))


def _own_key(name: str, revision: str | None) -> str | dict[str, Any]:
    name = str(Path(name).expanduser()) if name.startswith("~") and is_local(name) else name
    if "+" in name or "@" in name:
        return {"model": {"path": name, **({"revision": revision} if revision else {})}}
    return f"{name}@{revision}" if revision else name


def _with_adapter(model: str | dict[str, Any], adapter: str | dict[str, Any]) -> str | dict[str, Any]:
    """mergekit's name of a model with an adapter: `model+adapter`, or the long form where one of them has that."""
    if isinstance(model, str) and isinstance(adapter, str):
        return f"{model}+{adapter}"
    whole = model if isinstance(model, dict) else {"model": model}
    return {**whole, "lora": adapter["model"] if isinstance(adapter, dict) else adapter}


def renamed_files(saliency: Any, rename: Callable[[str], str]) -> Any:
    """A model's `saliency` with its files renamed: one for all tensors, or under filters ("" is none)."""
    if isinstance(saliency, str):
        return rename(saliency) if saliency else saliency
    return [{**one, "value": renamed_files(one["value"], rename)} for one in saliency]


def file_key(file: Path, folder: Path | None) -> str:
    """How a recipe in `folder` names a file: from there, so that both may be moved together; None: by its whole path."""
    whole = file.resolve()
    return str(whole) if folder is None else os.path.relpath(whole, folder.resolve())


def recipe_name(config: Path, numbers: Sequence[float], method: str, tags: Sequence[str] = ()) -> str:
    """The recipe's file name: the released code's (`numbers`: gamma and epsilon), with tags before `_merge_config`."""
    return "_".join([config.stem, *map(str, numbers), "generated", method, *tags, "merge_config.yaml"])


def check_file_names(names: Sequence[str], config: Path) -> None:
    """Raise a `UserError` if a file name would be longer than file systems allow."""
    longest = max(names, key=lambda name: len(name.encode()))
    if len(longest.encode()) > _MAX_NAME_BYTES:
        raise UserError(
            f"the file name {longest[:60]}... would be too long; give {config.name} a shorter name",
            "file-name-too-long",
        )


def _weights(rows: "pd.DataFrame", naming: Naming, rest: float) -> list[dict[str, Any]]:
    """The weights under their filters, each filter once, before `rest`, which all others have.

    Raises ValueError if tensors of a group differ in weight.
    """
    by_tensor = dict(zip(rows["tensor"], map(float, rows["weight"]), strict=True))
    if naming.group_filters is None:
        order = {tensor: place for place, tensor in enumerate(naming.filters)}
        own = sorted(by_tensor, key=order.__getitem__)
        texts = [naming.filters[tensor] for tensor in own]
        return [*_all(naming.before, rest), *_conditional(texts, [by_tensor[tensor] for tensor in own])]
    found: dict[str, float] = {}
    for tensor, text in naming.group_filters.items():
        weight = by_tensor[naming.tied.get(tensor, tensor)]
        if found.setdefault(text, weight) != weight:
            raise ValueError(f"{tensor} has another weight than the rest of its group")
    return _conditional(list(found), list(found.values()))


def _all(texts: Sequence[str], value: float) -> list[dict[str, Any]]:
    return _conditional(texts, [value] * len(texts))


def _conditional(texts: Sequence[str], values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"filter": text, "value": float(value)} for text, value in zip(texts, values, strict=True)]
