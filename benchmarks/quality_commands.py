"""One recipe per method through the three commands as a user types them; everything must agree bit for bit with what the
benchmark made by calling the functions behind them."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.quality_contenders import guided
from benchmarks.quality_pairs import Pair, measured
from utils.commands.merge import merge
from utils.guidance.method import guidance_methods
from utils.merging.settings import MergeSettings
from utils.publishing.manifest import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
# Flags that make the recipe of a method; the guided ones of the contenders' table with nothing to choose.
RECIPES = {
    "lewis": {"mean_density": 0.2},
    "sens_merging": {"lambda": 0.3},
    "submodule_linearity": {"level": "attention_mlp"},
    "saliency_budget": {"mask": "saliency", "mean_density": 0.2},
    "gram_mean": {},
    "tuned": {},
}


def check_commands(pair: Pair, device: str) -> None:
    """Repeat one recipe per method by the commands.

    Raises:
        AssertionError: a table, a recipe or a merged tensor differs.
    """
    assert RECIPES.keys() == guidance_methods().keys(), "a method without a recipe to check"
    for guidance, flags in RECIPES.items():
        folder = pair.folder / f"commands_{guidance}"
        shutil.rmtree(folder, ignore_errors=True)
        common = ("--guidance", guidance)
        _run("lewis_importance.py", "--config", pair.both, "--out_dir", folder / "dfs", "--device", device, *common)
        by_name = [word for name, value in flags.items() for word in (f"--{name}", value)]
        _run(
            "lewis_merge.py",
            *("--delta_dfs_in_dir", folder / "dfs", "--config_file", pair.both, "--out_dir", folder / "recipes"),
            *(*common, *by_name),
        )
        (recipe,) = (folder / "recipes").glob("*.yaml")
        _run("utils/merger.py", "--output_path", folder / "merged", "--merge_config", recipe, "--device", device)
        ours = guided(guidance, **flags).recipe(pair, device)
        _same_tables(measured(pair, guidance, device), folder / "dfs")
        assert _parts(ours) == _parts(recipe), f"{guidance}: the recipes differ"
        merge(MergeSettings(folder / "merged_by_function", ours, device=device, quiet=True))
        _same_weights(folder / "merged_by_function", folder / "merged")
        shutil.rmtree(folder)
        print(f"{guidance}: the three commands give the same bits", file=sys.stderr, flush=True)


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
