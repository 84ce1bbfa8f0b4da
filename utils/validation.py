"""Values from files that people write, checked by pydantic; its errors become this project's problems, all at once.

A file's content is a type: a dataclass made by `@checked`, whose fields say what they take. `read_checked` makes such a
value from plain data, or raises one `UserError` that names each mistake's key, value and remedy. Checks of the project's
own raise `Mistakes`.
"""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from utils.errors import Problem, collected
from utils.suggestions import suggestion

T = TypeVar("T")

checked = partial(
    dataclass,
    frozen=True,
    # Defaults may depend on other keys; inputs with aliases in them can be endless when printed.
    config=ConfigDict(extra="forbid", validate_default=True, hide_input_in_errors=True),
)


class Mistakes(ValueError):
    """What a validator finds wrong. Each text follows the key: `must be ...`, or `: it ...` where it is a clause."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.text for problem in problems))
        self.problems = problems


def refuse(problems: Iterable[Problem]) -> None:
    """Raise what was found, if anything was."""
    if found := tuple(problems):
        raise Mistakes(*found)


def one_line(text: str) -> str:
    """Refuse text that cannot be a name: blank, several lines, or with control characters."""
    if not text.strip() or not text.isprintable():
        raise Mistakes(Problem(f"must be text on one line, got {show(text)}", "bad-text"))
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(one_line)]


def read_checked(kind: type[T], data: Any, heading: str, prefix: str, context: Any = None) -> T:
    """Make a value of a checked type from plain data.

    Args:
        kind: the type.
        data: what the file holds.
        heading: what begins the message: what the file is, and its name.
        prefix: what begins the codes of mistakes that pydantic finds (`config-unknown-key`).
        context: handed to validators that ask for it.

    Raises:
        UserError: the data holds mistakes; all of them are in the one message.
    """
    try:
        return TypeAdapter(kind).validate_python(data, context=context)
    except ValidationError as error:
        found = [problem for each in error.errors(include_url=False) for problem in _problems(each, kind, prefix)]
        raise collected(found, heading) from error


def key_path(place: Iterable[Any]) -> str:
    """The path of a value as a person writes it: `model_info[1].name`."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            word = step if isinstance(step, str) and step.isidentifier() and len(step) <= 64 else show(step)
            path += f".{word}" if path else word
    return path


def show(value: Any) -> str:
    """A value for a message: its repr, at most 80 characters long."""
    if value is None:
        return "nothing"
    short = reprlib.Repr()  # bounded in depth and width: with aliases a value's plain repr can be exponentially long
    short.maxlevel, short.maxstring, short.maxother = 3, 78, 78
    text = short.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# What pydantic's errors are called here: the code's ending, and what the value must be.
_WRONG = {
    "int_type": ("wrong-type", "a whole number"),
    "int_from_float": ("wrong-type", "a whole number"),
    "float_type": ("wrong-type", "a number"),
    "string_type": ("wrong-type", "text"),
    "bool_type": ("wrong-type", "true or false"),
    "list_type": ("wrong-type", "a list"),
    "tuple_type": ("wrong-type", "a list"),
    "dict_type": ("wrong-type", "a mapping of keys to values"),
    "mapping_type": ("wrong-type", "a mapping of keys to values"),
    "dataclass_type": ("wrong-type", "a mapping with {keys}"),
    "greater_than": ("out-of-range", "above {gt}"),
    "greater_than_equal": ("out-of-range", "at least {ge}"),
    "less_than": ("out-of-range", "below {lt}"),
    "less_than_equal": ("out-of-range", "at most {le}"),
    "finite_number": ("out-of-range", "a finite number"),
    "too_short": ("wrong-length", "a list of at least {min_length}"),
    "too_long": ("wrong-length", "a list of at most {max_length}"),
    "literal_error": ("unknown-value", "{expected}"),
}


def _problems(error: Mapping[str, Any], kind: type, prefix: str) -> Iterator[Problem]:
    place, value, code = error["loc"], error["input"], error["type"]
    if code in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        name = value if code == "invalid_key" else place[-1]
        known = _keys(_type_at(kind, place[:-1]))
        hint = suggestion(name, known, f"known keys: {', '.join(known)}", 0.5)
        where = key_path(place[:-1])
        yield Problem(f"unknown key {where}{'.' if where else ''}{show(name)}; {hint}", f"{prefix}-unknown-key")
        return
    where = key_path(place)
    if place and place[-1] == "[key]":  # a mapping's key, not the value that stands there
        where = f"{key_path(place[:-2])}: key {show(place[-2])}"
    if code == "missing":
        yield Problem(f"{where} is missing", f"{prefix}-missing-key")
    elif isinstance(own := error.get("ctx", {}).get("error"), Mistakes):
        for text, own_code in own.problems:
            space = "" if text.startswith((":", ".", "[")) else " "
            yield Problem(f"{where}{space}{text}", f"{prefix}-{own_code}")
    elif code in _WRONG:
        ending, wanted = _WRONG[code]
        limits = {name: f"{limit:g}" if type(limit) is float else limit for name, limit in error.get("ctx", {}).items()}
        keys = ", ".join(_keys(_type_at(kind, place))) if code == "dataclass_type" else ""
        must = wanted.format(**limits, keys=keys)
        yield Problem(f"{where} must be {must}{_hint(code, value)}, got {show(value)}", f"{prefix}-{ending}")
    else:
        yield Problem(f"{where}: {error['msg']}, got {show(value)}", f"{prefix}-{code.replace('_', '-')}")


def _hint(code: str, value: Any) -> str:
    """The remedy where YAML reads a word or number as something else than the writer meant, in brackets."""
    if code == "string_type" and isinstance(value, bool):
        return " (YAML reads yes/no/on/off as booleans: put it in quotes)"
    if code == "string_type" and isinstance(value, (int, float)):
        return " (put it in quotes)"
    if code == "float_type" and isinstance(value, str):
        return " (write it with a point, such as 0.001, without quotes)"
    return ""


def _type_at(kind: Any, place: Iterable[Any]) -> type:
    """The checked type whose keys stand at a place inside a value of another one."""
    for step in place:
        kind = get_type_hints(kind)[step] if is_dataclass(kind) else _parts(kind)[-1]
        if get_origin(kind) in (Union, UnionType):
            (kind,) = _parts(kind)
    return kind


def _keys(kind: Any) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in kind.__pydantic_fields__.items())


def _parts(kind: Any) -> list[Any]:
    """What a container, or a type that may be missing, is made of."""
    return [part for part in get_args(kind) if part not in (Ellipsis, NoneType)]
