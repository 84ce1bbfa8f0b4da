"""A merge recipe against mergekit's own schema and the merge method's own parameters.

mergekit ignores unknown keys and unknown parameters; here each is an error with the nearest known name. What is known
is asked of the installed mergekit, not listed here. Importing it takes seconds, so this room is imported late.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge import _set_chat_template
from mergekit.merge_methods import MergeMethod
from mergekit.merge_methods.base import BasePolicy, ParameterScope
from pydantic import BaseModel, ValidationError

from utils.errors import UserError, raise_collected
from utils.merge_recipe import MergeRecipe

DTYPES = ("bfloat16", "float16", "float32", "float64")


class OrderedConfiguration(MergeConfiguration):
    """A `MergeConfiguration` whose models keep the order of the recipe, the base first.

    mergekit collects them in a set, so that the donor of a merge without `base_model` and the order of the tokens that
    a vocabulary union adds differ from run to run.
    """

    def referenced_models(self) -> list[ModelReference]:
        """The base and the merged models, each once."""
        layers = [*(self.models or []), *_sources(self.slices)]
        for module in (self.modules or {}).values():
            layers += [*(module.models or []), *_sources(module.slices)]
        bases = [self.base_model] if self.base_model else []
        return list(dict.fromkeys([*bases, *(layer.model for layer in layers)]))


def _sources(slices: Iterable[Any] | None) -> Iterator[Any]:
    for output_slice in slices or ():
        yield from output_slice.sources


def parse_recipe(recipe: MergeRecipe) -> tuple[OrderedConfiguration, MergeMethod, list[str]]:
    """Check a recipe's names and turn it into mergekit's configuration.

    Returns:
        The configuration, the merge method, and warnings (sentences) about parameters without effect.

    Raises:
        UserError: unknown keys, methods, parameters or dtypes, each with the nearest known name; values that mergekit
            does not take; a method that needs a base without one. All problems are reported together.
    """
    data = recipe.data
    problems = list(_unknown_keys(MergeConfiguration, data, ""))
    method = _method(data["merge_method"], problems)
    raise_collected(problems, recipe.where)
    config = _configuration(recipe)
    assert method is not None
    sliced_base = any(one.base_model for one in config.slices or ())
    if method.spec.contract.base == BasePolicy.REQUIRED and config.base_model is None and not sliced_base:
        problems.append(f"base_model is missing; {config.merge_method} merges changes relative to a base")
    if method.spec.contract.base == BasePolicy.FORBIDDEN and config.base_model is not None:
        problems.append(f"base_model: {config.merge_method} takes none; remove it")
    for key in ("dtype", "out_dtype"):
        problems += _dtype_slips(key, getattr(config, key))
    warnings: list[str] = []
    for where, parameters, of_input, model in settings_blocks(config):
        problems += _parameter_slips(where, parameters, of_input, method, model)
        warnings += _idle(where, parameters, method, model is not None and model == config.base_model)
    problems += _chat_template_slips(config)
    raise_collected(problems, recipe.where)
    return config, method, warnings


def _configuration(recipe: MergeRecipe) -> OrderedConfiguration:
    try:
        return OrderedConfiguration.model_validate(recipe.data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or part.islower())
        raise UserError(f"{recipe.where}: {place or 'recipe'}: {first['msg']}, got {first['input']!r}") from None
    except RuntimeError as error:  # mergekit's validators raise it for malformed model names and exclusive keys
        hint = "; write a folder whose name holds '+' or '@' as model: {model: {path: ...}}"
        raise UserError(f"{recipe.where}: {error}{hint if 'pars' in str(error) or '@' in str(error) else ''}") from None


def _method(name: str, problems: list[str]) -> MergeMethod | None:
    try:
        return merge_methods.get(name)
    except RuntimeError:
        known = sorted(method.spec.name for method in merge_methods.registered_methods())
        problems.append(f"merge_method {name!r} is unknown; {nearest(name.lower().replace('-', '_'), known)}")
        return None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _unknown_keys(annotation: Any, value: Any, where: str) -> Iterator[str]:
    """Keys of `value` that mergekit's schema has no field for, at any depth."""
    kinds = list(_alternatives(annotation))
    if isinstance(value, Mapping):
        tables = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields = {name: field.annotation for kind in models for name, field in kind.model_fields.items()}
        for key, inner in value.items():
            at = f"{where}.{key}" if where else str(key)
            if tables:
                yield from _unknown_keys(typing.Union[tuple(tables)], inner, at)  # noqa: UP007
            elif key in fields:
                yield from _unknown_keys(fields[key], inner, at)
            elif models:
                yield f"{at} is unknown; {nearest(str(key), fields)}"
    elif isinstance(value, list):
        items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        for place, inner in enumerate(value if items else []):
            yield from _unknown_keys(typing.Union[tuple(items)], inner, f"{where}[{place}]")  # noqa: UP007


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, at any depth; anything else as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _dtype_slips(key: str, name: str | None) -> Iterator[str]:
    try:
        if name is None or dtype_from_name(name).is_floating_point:
            return
    except RuntimeError:
        pass
    yield f"{key} {name!r} is unknown; {nearest(str(name), DTYPES)}"


def settings_blocks(
    config: MergeConfiguration,
) -> Iterator[tuple[str, Mapping[str, Any], bool, ModelReference | None]]:
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


def _parameter_slips(
    where: str, parameters: Mapping[str, Any], of_input: bool, method: MergeMethod, model: ModelReference | None
) -> Iterator[str]:
    known = {parameter.name: parameter for parameter in method.spec.parameters}
    usable = [name for name, one in known.items() if not of_input or one.scope != ParameterScope.SHARED]
    for name, setting in parameters.items():
        if name not in known:
            yield f"{where}.{name} is unknown to {method.spec.name}; {nearest(name, usable)}"
        elif name not in usable:
            yield f"{where}.{name} has no effect under one model ({model}); move it to the recipe's own parameters"
        else:
            yield from (f"{where}.{name}: {slip}" for slip in _type_slips(known[name], setting))


def _type_slips(parameter: Any, setting: Any) -> Iterator[str]:
    if isinstance(setting, ConditionalParameter):
        yield from _type_slips(parameter, setting.value)
    elif isinstance(setting, list):
        for item in setting:
            yield from _type_slips(parameter, item)
    else:
        try:
            parameter.validate(setting)
        except ValidationError as error:
            yield f"{error.errors()[0]['msg']}, got {setting!r}"


def _idle(where: str, parameters: Mapping[str, Any], method: MergeMethod, of_base: bool) -> Iterator[str]:
    """Parameters that are accepted and do nothing."""
    scopes = {parameter.name: parameter.scope for parameter in method.spec.parameters}
    for name in parameters:
        if of_base and scopes[name] == ParameterScope.NON_BASE:
            yield f"{where}.{name} has no effect: that model is the base"
    if "density" in parameters and getattr(method, "sparsification_method", "") is None:
        yield f"{where}.density has no effect: {method.spec.name} adds whole deltas; ties or dare_linear use densities"


class _TemplateHolder:
    """Stands in for a tokenizer while a recipe's chat template is checked."""

    chat_template: str | None = None


def _chat_template_slips(config: MergeConfiguration) -> Iterator[str]:
    if config.chat_template and config.chat_template != "auto":
        try:
            _set_chat_template(_TemplateHolder(), config)
        except RuntimeError:
            yield (
                f"chat_template {config.chat_template!r} is neither auto, nor a template mergekit ships, nor a Jinja "
                "template"
            )
