"""The names and values in a merge recipe, checked before mergekit is imported, which takes seconds.

mergekit ignores keys and parameters that it does not know, so that a typing error changes a merge without a word; here
each is an error with the nearest known name. What is known is the recipe as a type, and the merge methods with their
parameters; tests compare both with the installed mergekit.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationError, ValidationInfo

from utils.errors import Problem
from utils.merging.known_methods import METHODS, KnownMethod, reader, setting_problems
from utils.merging.recipe_file import KEYWORDS, MergeRecipe
from utils.recipes.named_model import NamedModel
from utils.suggestions import as_written, suggestion
from utils.validation import Mistakes, checked, read_checked, refuse, show

_MOST_LAYERS = 1_000  # more than any model has; a plan of ten thousand takes a minute
DTYPES = ("bfloat16", "float16", "float32", "float64")


def _settings(parameters: dict[str, Any] | None, info: ValidationInfo, *, own: bool) -> dict[str, Any] | None:
    """Check the parameters at one place by the recipe's method, which is the context."""
    if info.context is not None:
        refuse(setting_problems(info.context, parameters or {}, own=own))
    return parameters


def _split(text: Any, mark: str, first: str, second: str) -> Any:
    """`first`, or `first` and `second` with a mark between them, as mergekit reads a model's name."""
    if not isinstance(text, str):
        return text
    if text.count(mark) > 1 or "\0" in text:
        why = f": {show(text)} cannot be read; write a folder whose name holds {mark!r} as model: {{model: {{path: ...}}}}"
        raise Mistakes(Problem(why, "bad-model"))
    before, found, after = text.partition(mark)
    return {first: before, second: after} if found else {first: before}


@checked
class ModelPath:
    """A hub id or folder, `path@revision` as text."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


_Path = Annotated[ModelPath, BeforeValidator(partial(_split, mark="@", first="path", second="revision"))]


@checked
class ModelName:
    """A model, `model+adapter` as text."""

    model: _Path
    lora: _Path | None = None
    override_architecture: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)

    @property
    def recorded(self) -> NamedModel:
        """What the recipe's manifest knows it by."""
        return NamedModel(self.model.path, self.model.revision, str(self.lora) if self.lora else None)


Name = Annotated[ModelName, BeforeValidator(partial(_split, mark="+", first="model", second="lora"))]
OwnSettings = Annotated[dict[str, Any] | None, AfterValidator(partial(_settings, own=True))]
SharedSettings = Annotated[dict[str, Any] | None, AfterValidator(partial(_settings, own=False))]


@checked
class Model:
    """One entry of `models`."""

    model: Name
    parameters: OwnSettings = None


def _layers(found: tuple[int, int]) -> tuple[int, int]:
    first, stop = found
    if not 0 <= first < stop <= _MOST_LAYERS:
        text = f": [{first}, {stop}] is no range of layers: the first one, and the one behind the last"
        raise Mistakes(Problem(text, "bad-layer-range"))
    return found


@checked
class Source:
    """One entry of `sources`."""

    model: Name
    layer_range: Annotated[tuple[int, int], AfterValidator(_layers)]
    parameters: OwnSettings = None


@checked
class Slice:
    """One entry of `slices`."""

    sources: list[Source]
    base_model: Name | None = None
    residual_weight: float | None = None
    parameters: SharedSettings = None


@checked
class Module:
    """One entry of `modules`."""

    slices: list[Slice] | None = None
    models: list[Model] | None = None
    parameters: SharedSettings = None


def _token_source(value: Any) -> Any:
    """Where an embedding comes from: a model, a token of a model, or nothing; mergekit checks the latter two's keys."""
    if value is None or (isinstance(value, dict) and "model" not in value):
        return value
    try:
        if isinstance(value, dict) and "kind" in value:
            return {**value, "model": reader(Name).validate_python(value["model"])}
        return reader(Name).validate_python(value)
    except ValidationError as error:
        raise Mistakes(Problem(f": {show(value)} is not a model", "bad-model")) from error


@checked
class Token:
    """Where one token's embedding comes from."""

    source: Annotated[Any, BeforeValidator(_token_source)] = None
    force: bool = False


def _multiple(found: int | None) -> int | None:
    if found is not None and found < 1:
        raise Mistakes(Problem(f": {found} must be 1 or more", "bad-multiple"))
    return found


@checked
class Tokenizer:
    """The `tokenizer` block."""

    source: Name = "union"
    tokens: dict[str, Token] | None = None
    pad_to_multiple_of: Annotated[int | None, AfterValidator(_multiple)] = None


def _known_method(name: str, info: ValidationInfo) -> str:
    if info.context is None:
        hint = suggestion(as_written(name), METHODS, f"known: {', '.join(sorted(METHODS))}", 0.5)
        raise Mistakes(Problem(f"{name!r} is unknown; {hint}", "unknown-method"))
    return name


def _known_dtype(name: str | None) -> str | None:
    if name is not None and name.removeprefix("torch.") not in DTYPES:
        hint = suggestion(name, DTYPES, f"known: {', '.join(DTYPES)}", 0.5)
        raise Mistakes(Problem(f"{name!r} is unknown; {hint}", "unknown-dtype"))
    return name


def _base(name: ModelName | None, info: ValidationInfo) -> ModelName | None:
    method: KnownMethod | None = info.context
    sliced = any(one.base_model for one in info.data.get("slices") or ())
    if method and method.base == "required" and name is None and not sliced:
        text = f"is missing; {method.name} merges changes relative to a base"
        raise Mistakes(Problem(text, "no-base"))
    if method and method.base == "forbidden" and name is not None:
        raise Mistakes(Problem(f": {method.name} takes none; remove it", "needless-base"))
    return name


def _one_tokenizer_key(block: Tokenizer | None, info: ValidationInfo) -> Tokenizer | None:
    if block is not None and info.data.get("tokenizer_source") is not None:
        raise Mistakes(Problem("and tokenizer_source exclude each other; remove one of them", "two-tokenizers"))
    return block


Dtype = Annotated[str | None, AfterValidator(_known_dtype)]


@checked
class Recipe:
    """A whole recipe. Lists are None where their key is absent; names are as written."""

    merge_method: Annotated[str, AfterValidator(_known_method)]
    modules: dict[str, Module] | None = None
    slices: list[Slice] | None = None
    models: list[Model] | None = None
    base_model: Annotated[Name | None, AfterValidator(_base)] = None
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: Name | None = None
    tokenizer: Annotated[Tokenizer | None, AfterValidator(_one_tokenizer_key)] = None
    chat_template: str | None = None
    parameters: SharedSettings = None


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose names and values are known to be right, and what is known of its method."""

    file: MergeRecipe
    content: Recipe
    method: KnownMethod

    @property
    def models(self) -> list[ModelName]:
        """The base and the merged models, each once, in the order of the recipe, the base first."""
        return merged_models(self.content)

    @property
    def donors(self) -> list[ModelName]:
        """Models of which only tokens are taken."""
        merged = self.models
        return [name for name in dict.fromkeys(_names(self.content)) if name not in merged]

    def idle_parameters(self) -> Iterator[str]:
        """Sentences about parameters that are accepted and do nothing."""
        for where, parameters, _, model in settings_blocks(self.content):
            if model is not None and model == self.content.base_model and not self.method.of_base:
                for name in parameters:
                    yield f"{where}.{name} has no effect: that model is the base"
            if "density" in parameters and not self.method.cuts:
                name = self.method.name
                yield f"{where}.density has no effect: {name} adds whole deltas; ties or dare_linear use densities"


def check_recipe(recipe: MergeRecipe) -> CheckedRecipe:
    """Check the names and values in a recipe; mergekit is not imported.

    Raises:
        UserError: unknown keys, methods, parameters or dtypes, each with the nearest known name; values that mergekit
            does not take, are not finite, or are no shares; a method that needs a base without one. All are reported
            together.
    """
    method = METHODS.get(recipe.data["merge_method"])
    content = read_checked(Recipe, dict(recipe.data), recipe.where, "recipe", context=method)
    assert method is not None
    return CheckedRecipe(recipe, content, method)


def merged_models(content: Any) -> list[Any]:
    """The base and the merged models of a recipe (or mergekit's own value of it), each once, the base first."""
    layers = [*(content.models or []), *_sources(content.slices)]
    for module in (content.modules or {}).values():
        layers += [*(module.models or []), *_sources(module.slices)]
    bases = [content.base_model] if content.base_model else []
    return list(dict.fromkeys([*bases, *(layer.model for layer in layers)]))


def settings_blocks(content: Any) -> Iterator[tuple[str, Mapping[str, Any], bool, Any]]:
    """Every `parameters` mapping of a recipe (or mergekit's own value of it).

    Yields:
        Its place, itself, whether it belongs to one input, and that input.
    """
    places = [("", content)] + [(f"modules.{name}.", module) for name, module in (content.modules or {}).items()]
    for prefix, part in places:
        yield f"{prefix}parameters", part.parameters or {}, False, None
        for place, entry in enumerate(part.models or []):
            yield f"{prefix}models[{place}].parameters", entry.parameters or {}, True, entry.model
        for place, output_slice in enumerate(part.slices or []):
            yield f"{prefix}slices[{place}].parameters", output_slice.parameters or {}, False, None
            for number, source in enumerate(output_slice.sources):
                where = f"{prefix}slices[{place}].sources[{number}].parameters"
                yield where, source.parameters or {}, True, source.model


def is_keyword(holder: Any, key: str) -> bool:
    """Whether a key of a recipe's value says `union` or `base` where it could name a model whose tokenizer is taken."""
    donor = (isinstance(holder, Recipe) and key == "tokenizer_source") or (
        isinstance(holder, Tokenizer) and key == "source"
    )
    return donor and str(getattr(holder, key)) in KEYWORDS


def _sources(slices: Iterable[Any] | None) -> Iterator[Any]:
    for output_slice in slices or ():
        yield from output_slice.sources


def _names(value: Any) -> Iterator[ModelName]:
    """Every model's name inside a value."""
    if isinstance(value, ModelName):
        yield value
    elif is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        yield from (name for key, one in given.items() if not is_keyword(value, key) for name in _names(one))
    elif isinstance(value, dict):
        yield from (name for one in value.values() for name in _names(one))
    elif isinstance(value, (list, tuple)):
        yield from (name for one in value for name in _names(one))
