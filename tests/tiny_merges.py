"""Tiny models to merge, recipes for them, our merge and stock mergekit's, and tensors to compare."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.refusals import refused
from tests.tiny_checkpoints import block_prefix, save_tiny
from tests.tiny_pairs import contents, save_tokenizer
from utils.publishing.kept import kept_work
from utils.publishing.siblings import PROGRESS

_LARGE = 10**6  # entries: ties of larger tensors are left alone, which only takes time
NAMES = ("base", "code", "math")


def save_models(folder: Path, family: str = "llama", names: tuple[str, ...] = NAMES, **overrides: Any) -> Path:
    """Save `names` as models of one family with equal tokenizers; their weights differ, and no changes tie.

    Which of several equal magnitudes is kept is the one thing that merging in pieces does not share with mergekit.
    """
    for seed, name in enumerate(names):
        save_tokenizer(save_tiny(family, folder / name, seed=seed, **overrides))
        _part_ties(folder / names[0], folder / name)
    return folder


def without_ties(base: Any, other: Any, dtype: Any) -> Any:
    """`other`, but equal to `base` where a change has, in `dtype`, the magnitude of an earlier entry's change."""
    import torch

    change = (other.to(dtype) - base.to(dtype)).float().abs().reshape(-1)
    places = torch.arange(change.numel())
    _, group = change.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), change.numel()).scatter_reduce(0, group, places, "amin")
    return torch.where((first[group] < places).view(other.shape), base.to(other.dtype), other)


def _part_ties(base: Path, changed: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    before = tensors(base)
    for file in sorted(changed.glob("*.safetensors")):
        parted = {
            name: without_ties(before[name], value, torch.bfloat16)
            if name in before and before[name].shape == value.shape and value.numel() < _LARGE
            else value
            for name, value in load_file(file).items()
        }
        save_file(parted, file, metadata={"format": "pt"})


def recipe(
    folder: Path, method: str = "ties", experts: tuple[str, ...] = ("code", "math"), **keys: Any
) -> dict[str, Any]:
    """A recipe over the models in `folder`, as command 2 writes them: densities by filter, weight 1.

    Keyword arguments replace top-level keys; None removes one.
    """
    filters = [{"filter": f"model.layers.{i}.mlp.down_proj", "value": 0.3 + 0.1 * i} for i in range(3)]
    models: list[dict[str, Any]] = [{"model": str(folder / "base")}]
    for place, name in enumerate(experts):
        parameters: dict[str, Any] = {"weight": 1.0 - 0.25 * place}
        if method not in ("linear", "task_arithmetic"):
            parameters["density"] = [*copy.deepcopy(filters), {"value": 0.6}]
        models.append({"model": str(folder / name), "parameters": parameters})
    if method == "linear":
        models[0]["parameters"] = {"weight": 0.5}
    data = {"models": models, "merge_method": method, "base_model": str(folder / "base"), "dtype": "bfloat16"}
    if method == "linear":
        del data["base_model"]
    return {key: value for key, value in {**data, **keys}.items() if value is not None}


def plain_recipe(folder: Path, family: str, **keys: Any) -> dict[str, Any]:
    """A two-model ties recipe for any family, one filter per block."""
    filters = [{"filter": f"{block_prefix(family)}.{i}.", "value": 0.4} for i in range(3)]
    parameters = {"weight": 1, "density": [*filters, {"value": 1}]}
    models = [{"model": str(folder / "base")}, {"model": str(folder / "code"), "parameters": parameters}]
    return {"models": models, "merge_method": "ties", "base_model": str(folder / "base"), "dtype": "bfloat16", **keys}


def write_recipe(path: Path, data: Mapping[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))
    return path


def merge_here(folder: Path, data: Mapping[str, Any], output: str = "merged", **settings: Any) -> Path:
    """Merge by our command, in this process; returns the output folder."""
    from utils.commands.merge import merge
    from utils.merging.settings import MergeSettings

    path = write_recipe(folder / f"{output}.yaml", data)
    target = folder / output
    merge(MergeSettings(output_path=target, merge_config=path, **{"device": "cpu", "quiet": True, **settings}))
    return target


def assert_refused(
    folder: Path, data: Mapping[str, Any], code: str, words: str = "", output: str = "merged", **settings: Any
) -> None:
    """Merging stops with an error of this code and these words in it, and the folder is as it was but for the recipe and
    for what is finished, which is removed."""
    write_recipe(folder / f"{output}.yaml", data)
    before = contents(folder)
    with refused(code) as caught:
        merge_here(folder, data, output, **settings)
    assert words in str(caught.value), caught.value
    if kept := kept_work(caught.value):
        assert len((kept.folder / PROGRESS).read_text().splitlines()) > 1
        shutil.rmtree(kept.folder)
    assert not kept or code not in ("merge-not-finite", "merge-result-wrong", "merge-result-unloadable")
    assert contents(folder) == before


def merge_stock(folder: Path, data: Mapping[str, Any], output: str = "stock", seed: int = 0, **options: Any) -> Path:
    """Merge by stock mergekit, as `mergekit-yaml` does."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()
    settings = {"quiet": True, "write_model_card": False, "random_seed": seed, **options}
    run_merge(
        MergeConfiguration.model_validate(copy.deepcopy(dict(data))), str(folder / output), MergeOptions(**settings)
    )
    LoaderCache().loaders.clear()
    return folder / output


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a model folder by name."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Equal names, dtypes and bits."""
    import torch

    left, right = tensors(ours), tensors(theirs)
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
