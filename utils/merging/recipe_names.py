"""The names in a merge recipe (keys, methods, parameters, dtypes), checked against whatever knows them.

mergekit ignores unknown keys and unknown parameters; here each is an error with the nearest known name. What is known
comes from the caller: `utils/merging/known_names.py` has it written down, to answer in a fraction of a second, and
`utils/merging/recipe_schema.py` asks the installed mergekit. The rules and the messages are the same.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from utils.errors import UserError, raise_collected
from utils.merging.recipe_file import MergeRecipe

Schema = TypeVar("Schema", bound=BaseModel)

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class KnownParameter:
    """A parameter of a merge method. `type` is Python's; `of_input` whether each model has its own."""

    name: str
    type: Any
    of_input: bool


@dataclass(frozen=True)
class KnownMethod:
    """A merge method: `base` is its base model: `required`, `optional`, `ignored` or `forbidden`."""

    name: str
    base: str
    parameters: tuple[KnownParameter, ...]


def parse_names(
    recipe: MergeRecipe, schema: type[Schema], methods: Mapping[str, KnownMethod]
) -> tuple[Schema, list[str]]:
    """Check the names in a recipe and turn it into a value of the schema.

    Args:
        recipe: the recipe, checked in itself.
        schema: what is known of keys and their types.
        methods: the known merge methods by name.

    Returns:
        The recipe as a value of the schema, and what is wrong with it beyond that: parameters, dtypes, the base.

    Raises:
        UserError: unknown keys or method, each with the nearest known name; values of other types.
    """
    name = recipe.data["merge_method"]
    problems = list(unknown_keys(schema, recipe.data, ""))
    if name not in methods:
        hint = nearest(name.lower().replace("-", "_"), sorted(methods))
        problems.append(f"merge_method {name!r} is unknown; {hint}")
    raise_collected(problems, recipe.where)
    config, method = _validated(recipe, schema), methods[name]
    return config, [*_base_slips(config, method), *_dtype_slips(config), *_parameters_slips(config, method)]


def _validated(recipe: MergeRecipe, schema: type[Schema]) -> Schema:
    try:
        return schema.model_validate(recipe.data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or part.islower())
        raise UserError(f"{recipe.where}: {place or 'recipe'}: {first['msg']}, got {first['input']!r}") from None
    except RuntimeError as error:  # raised for malformed model names and exclusive keys
        hint = "; write a folder whose name holds '+' or '@' as model: {model: {path: ...}}"
        raise UserError(f"{recipe.where}: {error}{hint if 'pars' in str(error) or '@' in str(error) else ''}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def unknown_keys(annotation: Any, value: Any, where: str) -> Iterator[str]:
    """Keys of `value` that the schema has no field for, at any depth."""
    kinds = list(_alternatives(annotation))
    if isinstance(value, Mapping):
        tables = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields = {name: field.annotation for kind in models for name, field in kind.model_fields.items()}
        for key, inner in value.items():
            at = f"{where}.{key}" if where else str(key)
            if tables:
                yield from unknown_keys(typing.Union[tuple(tables)], inner, at)  # noqa: UP007
            elif key in fields:
                yield from unknown_keys(fields[key], inner, at)
            elif models:
                yield f"{at} is unknown; {nearest(str(key), fields)}"
    elif isinstance(value, list):
        items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        for place, inner in enumerate(value if items else []):
            yield from unknown_keys(typing.Union[tuple(items)], inner, f"{where}[{place}]")  # noqa: UP007


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, at any depth; anything else as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _base_slips(config: Any, method: KnownMethod) -> Iterator[str]:
    sliced_base = any(one.base_model for one in config.slices or ())
    if method.base == "required" and config.base_model is None and not sliced_base:
        yield f"base_model is missing; {method.name} merges changes relative to a base"
    if method.base == "forbidden" and config.base_model is not None:
        yield f"base_model: {method.name} takes none; remove it"


def _dtype_slips(config: Any) -> Iterator[str]:
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name is not None and name.removeprefix("torch.") not in DTYPES:
            yield f"{key} {name!r} is unknown; {nearest(name, DTYPES)}"


def merged_models(config: Any) -> list[Any]:
    """The base and the merged models of a configuration, each once, in the order of the recipe, the base first."""
    layers = [*(config.models or []), *_sources(config.slices)]
    for module in (config.modules or {}).values():
        layers += [*(module.models or []), *_sources(module.slices)]
    bases = [config.base_model] if config.base_model else []
    return list(dict.fromkeys([*bases, *(layer.model for layer in layers)]))


def _sources(slices: Iterable[Any] | None) -> Iterator[Any]:
    for output_slice in slices or ():
        yield from output_slice.sources


def settings_blocks(config: Any) -> Iterator[tuple[str, Mapping[str, Any], bool, Any]]:
    """Every `parameters` mapping: its place, itself, whether it belongs to one input, and that input."""
    places = [("", config)] + [(f"modules.{name}.", module) for name, module in (config.modules or {}).items()]
    for prefix, part in places:
        yield f"{prefix}parameters", part.parameters or {}, False, None
        for place, entry in enumerate(part.models or []):
            yield f"{prefix}models[{place}].parameters", entry.parameters or {}, True, entry.model
        for place, output_slice in enumerate(part.slices or []):
            yield f"{prefix}slices[{place}].parameters", output_slice.parameters or {}, False, None
            for number, source in enumerate(output_slice.sources):
                where = f"{prefix}slices[{place}].sources[{number}].parameters"
                yield where, source.parameters or {}, True, source.model


def _parameters_slips(config: Any, method: KnownMethod) -> Iterator[str]:
    known = {parameter.name: parameter for parameter in method.parameters}
    for where, parameters, of_input, model in settings_blocks(config):
        usable = [name for name, one in known.items() if one.of_input or not of_input]
        for name, setting in parameters.items():
            if name not in known:
                yield f"{where}.{name} is unknown to {method.name}; {nearest(name, usable)}"
            elif name not in usable:
                yield f"{where}.{name} has no effect under one model ({model}); move it to the recipe's own parameters"
            else:
                yield from (f"{where}.{name}: {slip}" for slip in _type_slips(known[name].type, setting))


def _type_slips(wanted: Any, setting: Any) -> Iterator[str]:
    if isinstance(setting, BaseModel):  # {filter, value}
        yield from _type_slips(wanted, setting.value)
    elif isinstance(setting, list):
        for item in setting:
            yield from _type_slips(wanted, item)
    else:
        try:
            _reader(wanted).validate_python(setting)
        except ValidationError as error:
            yield f"{error.errors()[0]['msg']}, got {setting!r}"


@lru_cache
def _reader(wanted: Any) -> TypeAdapter:
    return TypeAdapter(wanted)
