"""What mergekit 0.1.5 and this project know of recipe keys and merge methods, written down.

Importing mergekit takes seconds, and a slip in a recipe should be told at once. So the facts of its interface stand
here: the keys with their types, and the methods with their parameters. `utils/merging/recipe_schema.py` asks mergekit itself
later on. A test compares both; another release of mergekit is not judged by this table.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, model_validator

from utils.merging.recipe_names import KnownMethod, KnownParameter

RELEASE = "0.1.5"  # of mergekit

Scalar = bool | int | float | str
ScalarOrGradient = Scalar | list[Scalar]


class ModelPath(BaseModel, frozen=True):
    """A hub id or folder, `path@revision` as text."""

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, at, revision = value.partition("@")
        if "@" in revision:
            raise RuntimeError(f"Invalid model path - multiple @: {value}")
        return {"path": path, "revision": revision} if at else {"path": path}

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class ModelReference(BaseModel, frozen=True):
    """A model, `model+lora` as text."""

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        model, plus, lora = value.partition("+")
        if "+" in lora:
            raise RuntimeError(f"Can't parse {value}")
        return {"model": model, "lora": lora} if plus else {"model": model}

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


class ConditionalParameter(BaseModel):
    """A value for the tensors that a filter hits."""

    value: ScalarOrGradient
    filter: str | None = None


Parameters = dict[str, ConditionalParameter | list[ConditionalParameter] | ScalarOrGradient] | None


class InputModelDefinition(BaseModel):
    """One entry of `models`."""

    model: ModelReference
    parameters: Parameters = None


class InputSliceDefinition(BaseModel):
    """One entry of `sources`."""

    model: ModelReference
    layer_range: tuple[int, int]
    parameters: Parameters = None


class OutputSliceDefinition(BaseModel):
    """One entry of `slices`."""

    sources: list[InputSliceDefinition]
    base_model: ModelReference | None = None
    residual_weight: float | None = None
    parameters: Parameters = None


class OutputModuleDefinition(BaseModel):
    """One entry of `modules`."""

    slices: list[OutputSliceDefinition] | None = None
    models: list[InputModelDefinition] | None = None
    parameters: Parameters = None


class ModelTokenEmbedding(BaseModel, frozen=True):
    """The embedding of a model's token."""

    kind: Literal["model_token"]
    model: ModelReference
    token_id: int | None = None
    token: str | None = None


class ZeroEmbedding(BaseModel, frozen=True):
    """An embedding of zeros."""

    kind: Literal["zero"]


class TokenEmbeddingConfig(BaseModel, frozen=True):
    """Where one token's embedding comes from."""

    source: ModelTokenEmbedding | ZeroEmbedding | ModelReference | None = None
    force: bool = False


class TokenizerConfig(BaseModel, frozen=True):
    """The `tokenizer` block."""

    source: ModelReference | Literal["union"] | Literal["base"] = "union"
    tokens: dict[str, TokenEmbeddingConfig] | None = None
    pad_to_multiple_of: int | None = None


class MergeConfiguration(BaseModel):
    """A whole recipe."""

    modules: dict[str, OutputModuleDefinition] | None = None
    slices: list[OutputSliceDefinition] | None = None
    models: list[InputModelDefinition] | None = None
    merge_method: str
    base_model: ModelReference | None = None
    dtype: str | None = None
    tokenizer_source: Literal["union"] | Literal["base"] | ModelReference | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    out_dtype: str | None = None
    parameters: Parameters = None


def _method(
    name: str, base: str, shared: Mapping[str, Any], own: Mapping[str, Any], *, own_first: bool = False
) -> KnownMethod:
    ours = [KnownParameter(parameter, kind, True) for parameter, kind in own.items()]
    all_models = [KnownParameter(parameter, kind, False) for parameter, kind in shared.items()]
    return KnownMethod(name, base, tuple(ours + all_models if own_first else all_models + ours))


_SHARED = {"int8_mask": bool, "normalize": bool, "rescale": bool, "lambda": float}
_OWN = {"weight": float, "density": float}
_WEIGHT = {"weight": float}

METHODS: Mapping[str, KnownMethod] = {
    method.name: method
    for method in (
        _method("arcee_fusion", "required", {}, {}),
        _method("breadcrumbs", "required", _SHARED, _OWN | {"gamma": float}),
        _method("breadcrumbs_ties", "required", _SHARED, _OWN | {"gamma": float}),
        _method("dare_linear", "required", _SHARED, _OWN),
        _method("dare_ties", "required", _SHARED, _OWN),
        _method("della", "required", _SHARED, _OWN | {"epsilon": float}),
        _method("della_linear", "required", _SHARED, _OWN | {"epsilon": float}),
        _method("karcher", "ignored", {"max_iter": int, "tol": float}, {}),
        _method("linear", "ignored", {"normalize": bool}, _WEIGHT, own_first=True),
        _method("model_stock", "required", {"filter_wise": bool}, {}),
        _method("multislerp", "optional", {"normalize_weights": bool, "eps": float}, _WEIGHT, own_first=True),
        _method("nearswap", "required", {"t": float}, {}),
        _method("nuslerp", "optional", {"nuslerp_row_wise": bool, "nuslerp_flatten": bool}, _WEIGHT, own_first=True),
        _method("passthrough", "ignored", {}, {"scale": float | None}),
        _method("ram", "required", {"epsilon": float}, {}),
        _method("ramplus_tl", "required", {"r": float, "alpha": float, "epsilon": float}, {}),
        _method("sce", "required", {"int8_mask": bool, "select_topk": float}, {}),
        _method("slerp", "required", {"t": float}, {}),
        _method("task_arithmetic", "required", _SHARED, _OWN),
        _method("ties", "required", _SHARED, _OWN),
        # this project's own (utils/merging/guided/methods.py)
        _method(
            "guided_ties",
            "required",
            {"int8_mask": bool, "normalize": bool, "vote": bool, "lambda": float},
            _OWN | {"saliency": str},
        ),
        _method("guided_mean", "required", {"lambda": float, "power": float, "floor": float}, _OWN | {"saliency": str}),
    )
}
