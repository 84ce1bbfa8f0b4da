"""Which cases of a grid `make test` runs; `make test-slow` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases, each a value or a tuple of values, those that are not `quick` marked slow."""
    cases = list(cases)
    assert set(quick) <= set(cases), "a quick case that is none of the cases"
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
