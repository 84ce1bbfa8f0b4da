"""Peers of the quality benchmark that no recipe can say, written as model folders that are judged like merges."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality_contenders import Variant
from benchmarks.quality_pairs import Pair
from benchmarks.quality_peers import isotropic, task_singular_vectors, truncated_svd

WEIGHTS = "model.safetensors"
Formula = Callable[[Sequence[Tensor]], Tensor]


def peers_of_one(task: str, density: float) -> dict[str, Variant]:
    """Peers of one expert at a share of its change's numbers."""
    return {"truncated SVD": low_rank(task, density)}


def peers_of_two() -> dict[str, list[Variant]]:
    """Peers of several experts, each with the settings among which validation chooses."""
    return {
        "TSV-M": [task_vectors(scale) for scale in (0.5, 0.75, 1.0)],
        "Iso-C": [isotropic_sum(scale) for scale in (0.5, 1.0)],
    }


def low_rank(task: str, density: float) -> Variant:
    """One expert's linear layers by a truncated SVD of the change that holds a share of its numbers; the rest whole."""
    return _variant(f"svd {task} {density:g}", lambda changes: truncated_svd(changes[0], density), tasks=(task,))


def task_vectors(scale: float) -> Variant:
    """TSV-M, linear layers scaled; the rest is the mean."""
    return _variant(f"tsv_m {scale:g}", task_singular_vectors, scale)


def isotropic_sum(scale: float) -> Variant:
    """Iso-C, linear layers scaled; the rest is the mean."""
    return _variant(f"iso_c {scale:g}", isotropic, scale)


def _variant(name: str, formula: Formula, scale: float = 1.0, tasks: Sequence[str] = ()) -> Variant:
    def folder(pair: Pair, device: str) -> Path:
        experts = [path for task, path in pair.trained.experts.items() if not tasks or task in tasks]
        target = pair.folder / "peers" / name
        if not (target / WEIGHTS).exists():
            base, *others = (load_file(path / WEIGHTS) for path in (pair.trained.base, *experts))
            shutil.copytree(pair.trained.base, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
            save_file(peer_weights(base, others, formula, scale), target / WEIGHTS, metadata={"format": "pt"})
        return target

    return Variant(name, folder)


def peer_weights(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], formula: Formula, scale: float = 1.0
) -> dict[str, Tensor]:
    """A model's tensors: `scale` times the formula in the blocks' matrices, the mean of the changes elsewhere, bfloat16."""
    merged = {}
    for name, value in base.items():
        changes = [expert[name].double() - value.double() for expert in experts]
        is_layer = value.dim() == 2 and "proj" in name
        change = scale * formula(changes) if is_layer else sum(changes) / len(changes)
        merged[name] = (value.double() + change).to(torch.bfloat16)
    return merged
