"""Typed values from plain data: what pydantic finds is said with key, value and remedy, under a stable code.

python -m pytest tests/test_validation.py
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BeforeValidator, Field

from tests.refusals import refused
from utils.errors import Problem
from utils.validation import Mistakes, Text, checked, key_path, read_checked, refuse, show


def _even(number: int) -> int:
    refuse([Problem(f": {number} is odd", "odd")] if number % 2 else [])
    return number


@checked
class Wheel:
    """Something to hold."""

    size: Annotated[int, Field(strict=True, ge=1), AfterValidator(_even)]
    kind: Literal["wood", "steel"] = "wood"


@checked
class Car:
    """Something that holds."""

    name: Text
    wheels: tuple[Wheel, ...] = ()
    spare: Wheel | None = None
    named: Mapping[Text, Wheel] = Field(default_factory=dict)
    speed: Annotated[float, Field(strict=True, gt=0, le=1.5, allow_inf_nan=False)] = 1.0
    doors: Annotated[tuple[bool, ...], Field(min_length=1, strict=False)] = (True,)


@checked
class Twice:
    """Something with several mistakes."""

    wheel: Wheel
    value: Annotated[int, BeforeValidator(lambda value: refuse([Problem("is a", "a"), Problem(": and b", "b")]))]


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        ({"name": 3}, "car-wrong-type", "name must be text (put it in quotes), got 3"),
        (
            {"name": False},
            "car-wrong-type",
            "name must be text (YAML reads yes/no/on/off as booleans: put it in quotes)",
        ),
        ({"name": " "}, "car-bad-text", "name must be text on one line, got ' '"),
        ({"wheels": [{"size": 2}, {"szie": 2}]}, "car-missing-key", "wheels[1].size is missing"),
        ({"wheels": [{"size": 2, "szie": 2}]}, "car-unknown-key", "unknown key wheels[0].'szie'; did you mean 'size'?"),
        ({"spare": {"size": 2, "colour": 1}}, "car-unknown-key", "unknown key spare.'colour'; known keys: size, kind"),
        ({"named": {"a b": {"size": 3}}}, "car-odd", "named.'a b'.size: 3 is odd"),
        ({"named": {"front": {"sise": 2, "size": 2}}}, "car-unknown-key", "unknown key named.front.'sise'"),
        ({"named": {7: {"size": 2}}}, "car-wrong-type", "named: key 7 must be text (put it in quotes), got 7"),
        ({"named": [1]}, "car-wrong-type", "named must be a mapping of keys to values, got [1]"),
        ({"spare": 4}, "car-wrong-type", "spare must be a mapping with size, kind, got 4"),
        ({"spare": {"size": 0}}, "car-out-of-range", "spare.size must be at least 1, got 0"),
        ({"spare": {"size": 2, "kind": "wod"}}, "car-unknown-value", "spare.kind must be 'wood' or 'steel', got 'wod'"),
        ({"speed": 2}, "car-out-of-range", "speed must be at most 1.5, got 2"),
        ({"speed": 0}, "car-out-of-range", "speed must be above 0, got 0"),
        ({"speed": float("nan")}, "car-out-of-range", "speed must be "),
        ({"speed": "1e-3"}, "car-wrong-type", "speed must be a number (write it with a point, such as 0.001, without"),
        ({"doors": []}, "car-wrong-length", "doors must be a list of at least 1, got []"),
        ({3: 4}, "car-unknown-key", "unknown key 3; known keys: name, wheels"),
    ],
)
def test_key_value_and_remedy(data, code, words):
    with refused(code) as caught:
        read_checked(Car, {"name": "x", **data}, "car c.yaml", "car")
    assert words in str(caught.value) and str(caught.value).startswith("car c.yaml: ")


def test_a_validator_may_find_several_mistakes():
    with refused("car-a") as caught:
        read_checked(Twice, {"wheel": {"size": 1}, "value": 0}, "car c.yaml", "car")
    assert caught.value.codes == ("car-odd", "car-a", "car-b")
    assert str(caught.value).splitlines()[1:] == ["  - wheel.size: 1 is odd", "  - value is a", "  - value: and b"]
    assert caught.value.__cause__ is not None


def test_values_are_frozen_and_of_their_type():
    wheel = read_checked(Wheel, {"size": 4}, "wheel", "wheel")
    assert wheel == Wheel(4) and wheel.kind == "wood" and hash(wheel) == hash(Wheel(4))
    with pytest.raises(AttributeError):
        wheel.size = 2


def test_nothing_found_is_no_mistake():
    refuse([])
    with pytest.raises(Mistakes, match="x; y"):
        refuse([Problem("x", "a"), Problem("y", "b")])


def test_paths_and_values_as_a_person_writes_them():
    assert key_path(["a", 1, "b", "c d", 2]) == "a[1].b.'c d'[2]"
    assert show(None) == "nothing" and len(show("x" * 1000)) <= 80
