"""The components of a pair config: the linear layers of a block that are measured, by their module paths."""

import re
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from utils.errors import Problem
from utils.validation import Mistakes, Text, refuse, show

_MODULE_PATH = re.compile(r"\w+(\.\w+)*")


def _listed_components(raw: Any) -> Any:
    if raw == "auto":
        return None
    if not isinstance(raw, list) or not raw:
        text = f"must be 'auto' or a list of names such as q_proj, got {show(raw)}"
        raise Mistakes(Problem(text, "wrong-type"))
    return raw


def _each_component_once(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    repeated = [name for name, count in Counter(names or ()).items() if count > 1]
    refuse(Problem(f": {show(name)} is listed twice", "component-twice") for name in repeated)
    return names


def _module_path(text: str) -> str:
    if not _MODULE_PATH.fullmatch(text):
        example = "q_proj, mlp.c_proj or self_attn.q_proj"
        raise Mistakes(
            Problem(f"must be a module path inside a block, such as {example}, got {show(text)}", "bad-path")
        )
    return text


ModulePath = Annotated[Text, AfterValidator(_module_path)]
Components = Annotated[
    tuple[ModulePath, ...] | None, BeforeValidator(_listed_components), AfterValidator(_each_component_once)
]
