"""What is written down of mergekit's interface is what the installed mergekit has.

python -m pytest tests/merging/test_known_names.py
"""

import types
import typing
from importlib import metadata

import pytest
from pydantic import BaseModel

from utils.merging import known_names

pytestmark = pytest.mark.skipif(
    metadata.version("mergekit") != known_names.RELEASE, reason="another release of mergekit is not judged by the table"
)


def outline(kind):
    """A type as plain data: unions flat, models by name with the outlines of their fields and what is required."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        members = [outline(part) for part in parts]
        return ("union", *(inner for one in members for inner in (one[1:] if one[0] == "union" else [one])))
    if origin is typing.Literal:
        return ("literal", *parts)
    if origin is not None:
        return (origin.__name__, *map(outline, parts))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {name: (outline(one.annotation), one.is_required()) for name, one in kind.model_fields.items()}
        return (kind.__name__, fields)
    return (kind.__name__,)


def test_every_key_and_type_is_mergekits():
    from mergekit.config import MergeConfiguration

    assert outline(known_names.MergeConfiguration) == outline(MergeConfiguration)


def test_every_method_and_parameter_is_mergekits():
    from utils.merging.recipe_schema import known_methods

    assert known_methods() == known_names.METHODS


def test_an_outline_notices_what_could_change():
    class Field(BaseModel):
        name: str

    class Other(Field):
        size: int | None = None

    kinds = [str, int, str | None, list[str], list[int], dict[str, int], typing.Literal["a"], Field, Other]
    assert len({repr(outline(kind)) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "text", ["a", "a/b", "a@main", "a+b", "a@main+b@dev", "a@", "+b", "", "a b", "./x+y/z", "a@b@c", "a+b+c", "a+b@c@d"]
)
def test_model_names_are_read_as_mergekit_reads_them(text):
    from mergekit.common import ModelReference

    def read(kind):
        try:
            return kind.model_validate(text)
        except RuntimeError as error:
            return error

    ours, theirs = read(known_names.ModelReference), read(ModelReference)
    assert str(ours) == str(theirs)
    if isinstance(theirs, ModelReference):
        assert dict(ours.model) == dict(theirs.model)
        assert (ours.lora and dict(ours.lora)) == (theirs.lora and dict(theirs.lora))
