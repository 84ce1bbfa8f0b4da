"""One recipe per method, and those that lead, through the three commands as a user types them; everything must agree bit for
bit with what the benchmark made by calling the functions behind them."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality_contenders import START, Variant, guided, in_rounds, tuned
from benchmarks.quality_pairs import Pair
from utils.commands.merge import merge
from utils.guidance.method import guidance_methods
from utils.merging.settings import MergeSettings
from utils.publishing.manifest import MANIFEST

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Repeated:
    """A recipe that is made twice: by `variant`, whose measurement is called `measured`, and by the commands.

    `measure` and `decide` are flags of commands 1 and 2; `alone` is the task of the one expert that is merged, "" for all.
    `starts` says that command 1 starts from the recipe that the variant was started from.
    """

    guidance: str
    variant: Variant
    measured: str = ""
    measure: Mapping[str, Any] = field(default_factory=dict)
    decide: Mapping[str, Any] = field(default_factory=dict)
    alone: str = ""
    starts: bool = False


def repeated(task: str) -> dict[str, Repeated]:
    """One recipe per method, of the contenders' with nothing to choose, and those that lead; `task` is one of the pair's."""

    def plainly(guidance: str, **flags: Any) -> Repeated:
        return Repeated(guidance, guided(guidance, **flags), decide=flags)

    def cut(**flags: Any) -> Repeated:
        own = {"mean_density": 0.1, **flags}
        return Repeated("gram_mean", guided("gram_mean", task, **own), decide=own, alone=task)

    start = in_rounds(2, **{"lambda": 1.0})
    return {
        "lewis": plainly("lewis", mean_density=0.2),
        "sens_merging": plainly("sens_merging", **{"lambda": 0.3}),
        "submodule_linearity": plainly("submodule_linearity", level="attention_mlp"),
        "saliency_budget": plainly("saliency_budget", mask="saliency", mean_density=0.2),
        "gram_mean": plainly("gram_mean"),
        "gram_mean, refitted": cut(),
        "gram_mean, low rank": cut(form="low_rank"),
        "gram_mean, two rounds": Repeated("gram_mean", start, "gram_mean_second", {"rounds": 2}, {"lambda": 1.0}),
        "tuned": plainly("tuned"),
        "tuned from two rounds": Repeated(
            "tuned", tuned(start), "tuned_gram_mean", decide={"merge_method": "gram_mean"}, starts=True
        ),
    }


def check_commands(pair: Pair, device: str, names: Sequence[str] | None = None) -> None:
    """Repeat recipes by the commands: all, or those of some names.

    Raises:
        AssertionError: a table, a recipe or a merged tensor differs.
    """
    known = repeated(next(iter(pair.trained.experts)))
    assert {one.guidance for one in known.values()} == guidance_methods().keys(), "a method without a recipe to check"
    for name in known if names is None else names:
        _check(pair, device, name, known[name])
        print(f"{name}: the three commands give the same bits", file=sys.stderr, flush=True)


def _check(pair: Pair, device: str, name: str, asked: Repeated) -> None:
    folder = pair.folder / f"commands_{name.replace(', ', '_').replace(' ', '_')}"
    shutil.rmtree(folder, ignore_errors=True)
    ours = asked.variant.recipe(pair, device)
    own, common = dict(asked.measure), ("--guidance", asked.guidance)
    if asked.starts:
        (own["start_recipe"],) = (pair.folder / START).glob("*.yaml")
    _run(
        "lewis_importance.py",
        *("--config", pair.both, "--out_dir", folder / "dfs", "--device", device, *common, *_words(own)),
    )
    config = pair.alone[asked.alone] if asked.alone else pair.both
    _run(
        "lewis_merge.py",
        *("--delta_dfs_in_dir", folder / "dfs", "--config_file", config, "--out_dir", folder / "recipes"),
        *(*common, *_words(asked.decide)),
    )
    (recipe,) = (folder / "recipes").glob("*.yaml")
    _run("utils/merger.py", "--output_path", folder / "merged", "--merge_config", recipe, "--device", device)
    _same_tables(pair.folder / f"measured_{asked.measured or asked.guidance}", folder / "dfs")
    assert _parts(ours) == _parts(recipe), f"{name}: the recipes differ"
    merge(MergeSettings(folder / "merged_by_function", ours, device=device, quiet=True))
    _same_weights(folder / "merged_by_function", folder / "merged")
    shutil.rmtree(folder)


def _words(flags: Mapping[str, Any]) -> list[object]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def _run(script: str, *words: object) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums depend on the number of threads
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, f"{script} failed:\n{done.stderr}"


def _same_tables(ours: Path, theirs: Path) -> None:
    names = {path.name for path in ours.iterdir()} - {MANIFEST}
    assert names == {path.name for path in theirs.iterdir()} - {MANIFEST}, f"{ours} and {theirs} hold different files"
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} differs"


def _parts(recipe: Path) -> tuple[dict, list[str]]:
    """A recipe without the places of its vector files, and the digests of these."""
    data = yaml.safe_load(recipe.read_text())
    files = [model["parameters"].pop("saliency", None) for model in data["models"] if "parameters" in model]
    return data, [hashlib.sha256((recipe.parent / file).read_bytes()).hexdigest() for file in files if file]


def _same_weights(ours: Path, theirs: Path) -> None:
    names = sorted(path.name for path in ours.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in theirs.glob("*.safetensors")), "other weight files"
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} of {ours} and {theirs} differ"
