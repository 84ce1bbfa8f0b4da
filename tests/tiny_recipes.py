"""What commands 1 and 2 make of `pair.yaml` in the current folder, by their own functions."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_pairs import CALIBRATION, save_pair, write_config
from utils.commands.decide import decide
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.options import DecideOptions
from utils.guidance.method import guidance_methods
from utils.guidance.recipe_choices import RecipeOptions
from utils.pair.config import read_pair_config


def own_defaults(guidance: str, half: str = "decide") -> dict[str, Any]:
    """The values of a method's own flags where none is given."""
    return {flag.name: flag.default for flag in guidance_methods()[guidance].flags(half)}


def pairs_by_family(
    new_folder: Callable[[str], Path], prepare: Callable[[], object] = lambda: None, **keys: Any
) -> Callable[[str], Path]:
    """Pairs with a text of its own for each expert, each made when its family is first asked for; read only.

    Args:
        new_folder: makes a folder (`tmp_path_factory.mktemp`).
        prepare: what to do in it, as the current folder, once: to measure.
        keys: more keys of the pair config.
    """

    @functools.cache
    def pair(family: str) -> Path:
        folder = save_pair(new_folder(family), family)
        write_config(folder, {"calibration": CALIBRATION, **keys})
        with contextlib.chdir(folder):
            prepare()
        return folder

    return pair


def measure_here(guidance: str, out: str | Path = "dfs", **asked: Any) -> Path:
    """Measure `pair.yaml` in float32 on the CPU, whatever experts gain on their text; returns the dataframe folder.

    Args:
        guidance: the method's name.
        out: the folder to write into.
        asked: flags of the method and fields of `MeasureOptions`, by name.
    """
    own = own_defaults(guidance, "measure")
    own |= {"accept_useless_text": True} if "accept_useless_text" in own else {}  # random models gain nothing on it
    own |= {name: asked.pop(name) for name in own if name in asked}
    given = {"dtype": "float32", "device": "cpu", **asked}
    measure_pair(MeasureOptions(read_pair_config("pair.yaml"), guidance_methods()[guidance], own, Path(out), **given))
    return Path(out)


def decide_here(guidance: str, measured: str | Path = "dfs", out: str | Path = "out", **asked: Any) -> list[Path]:
    """Make recipes of `pair.yaml` and what was measured; returns their paths, the guided one first.

    Args:
        guidance: the method's name.
        measured: the dataframe folder.
        out: the folder to write into.
        asked: flags of the method, fields of `RecipeOptions` and of `DecideOptions`, by name.
    """
    asked.setdefault("accept_edited", True)  # tests edit tables
    own = own_defaults(guidance)
    own |= {name: asked.pop(name) for name in own if name in asked}
    fields = {field.name for field in dataclasses.fields(RecipeOptions)}
    recipe = {name: asked.pop(name) for name in fields if name in asked}
    options = DecideOptions(
        config=read_pair_config("pair.yaml"),
        recipe=RecipeOptions(guidance_methods()[guidance], own, **recipe),
        delta_dfs_in_dir=Path(measured),
        out_dir=Path(out),
        **asked,
    )
    return [Path(out) / name for name in decide(options)]


def read_here(path: Path) -> dict[str, Any]:
    """A recipe as plain data, its files of vectors named from the current folder instead of its own."""
    data = yaml.safe_load(path.read_text())
    for model in data["models"]:
        parameters = model.get("parameters", {})
        if "saliency" in parameters:
            parameters["saliency"] = str(path.parent / parameters["saliency"])
    return data
