"""Peers of the quality benchmark that no recipe can say, written as model folders that are judged like merges."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality_contenders import Variant, plain, unguided
from benchmarks.quality_curvature import Curvature, curvature_mean, curvature_svd
from benchmarks.quality_pairs import Pair
from benchmarks.quality_peer_text import ExpertText, expert_texts, input_grams, load
from benchmarks.quality_peers import (
    fisher_average,
    isotropic,
    redundancy_free,
    regression_mean,
    task_singular_vectors,
    truncated_svd,
    wanda,
)
from utils.merging.guided.mean import WeighedModel, guided_mean
from utils.merging.guided.row_gram import RowChange, row_gram_mean
from utils.passes.axis_sums import row_column_factors
from utils.publishing.staging import staged_folder

CODE_VERSION = 2  # raise it when a change here or in the formulas changes what is written
WEIGHTS = "model.safetensors"
StateDict: TypeAlias = Mapping[str, Tensor]
Changes: TypeAlias = Sequence[Tensor]
Part: TypeAlias = Callable[[str, Changes], Tensor]
"""What becomes of one tensor, given its name and the experts' changes (float64): the merged change."""
Texts: TypeAlias = Callable[[], Mapping[str, ExpertText]]
"""Gives the experts by task with their text, measured when it is first asked for."""


def peers_of_one(task: str, density: float) -> dict[str, Variant]:
    """Peers of one expert at a share of its change's numbers."""
    return {
        "K-FAC SVD": _folder(f"kfac svd {task} {density:g}", partial(_curvature_svd, task, density), (task,)),
        "truncated SVD": _variant(
            f"svd {task} {density:g}", lambda text: (lambda name, own: truncated_svd(own[0], density), _mean), (task,)
        ),
        "Wanda": _variant(f"wanda {task} {density:g}", lambda text: (_wanda(text()[task], density), _mean), (task,)),
    }


def peers_of_two() -> dict[str, list[Variant]]:
    """Peers of several experts, each with the settings among which validation chooses."""
    weighings = ("equal", "by gain")
    return {
        "Model Stock": [unguided("model_stock")],
        "DARE": [plain("dare_linear", weight=w, density=d) for w in (0.2, 0.35, 0.5) for d in (0.5, 0.8)],
        "TSV-M": [_data_free(f"tsv_m {s:g}", task_singular_vectors, s) for s in (0.5, 0.75, 1.0)],
        "Iso-C": [_data_free(f"iso_c {s:g}", isotropic, s) for s in (0.5, 1.0)],
        "WUDI": [
            _data_free(f"wudi {s:g} {rate:g}", lambda own, rate=rate: redundancy_free(own, rate=rate), s)
            for s in (0.5, 1.0)
            for rate in (1e-5, 1e-4)
        ],
        "Fisher average": [_fisher_average(how) for how in weighings],
        "Fisher average, at base or both": [_fisher_average(how, at) for how in weighings for at in ("base", "both")],
        "RegMean": [_regmean(how, share, "mean") for how in weighings for share in (0.9, 1.0)],
        "RegMean with guided rest": [_regmean(how, share, "guided") for how in weighings for share in (0.9, 1.0)],
        "RegMean with guided rest, at base or both": [
            _regmean(how, 1.0, "guided", at) for how in weighings for at in ("base", "both")
        ],
        "K-FAC mean": [_curvature_mean(damping, at) for at in ("expert", "both") for damping in (0.03, 0.1, 0.3)],
        "RegMean++": [_regmean_along(how, "mean") for how in weighings],
        "RegMean++ with guided rest": [_regmean_along(how, "guided") for how in weighings],
    }


def _data_free(name: str, formula: Callable[[Changes], Tensor], scale: float) -> Variant:
    return _variant(name, lambda text: (lambda _, own: scale * formula(own), _mean))


def _fisher_average(weighing: str, at: str = "expert") -> Variant:
    def parts(text: Texts) -> tuple[Part, Part]:
        def part(name: str, own: Changes) -> Tensor:
            squares = [one.sums("squares", name, at) for one in text().values()]
            return fisher_average(own, squares, _weights(text(), weighing))

        return part, part

    return _variant(f"fisher {weighing}{_elsewhere(at)}", parts)


def _regmean(weighing: str, off_diagonal: float, rest: str, at: str = "expert") -> Variant:
    def parts(text: Texts) -> tuple[Part, Part]:
        def part(name: str, own: Changes) -> Tensor:
            grams = [one.sums("inputs", name, at) for one in text().values()]
            return regression_mean(own, grams, _weights(text(), weighing), off_diagonal)

        return part, _rest(text, rest, weighing, at)

    return _variant(f"regmean {weighing} {off_diagonal:g} {rest}{_elsewhere(at)}", parts)


def _curvature_mean(damping: float, at: str) -> Variant:
    def parts(text: Texts) -> tuple[Part, Part]:
        def part(name: str, own: Changes) -> Tensor:
            curvatures = [_curvature(one, name, at) for one in text().values()]
            return curvature_mean(own, curvatures, _weights(text(), "by gain"), damping)

        def rest(name: str, own: Changes) -> Tensor:
            if own[0].dim() != 2:
                return _rest(text, "guided", "by gain", at)(name, own)
            weighed = zip(own, _weights(text(), "by gain"), text().values(), strict=True)
            return row_gram_mean([
                RowChange(change, weight, one.sums("squares", name, at).sum(1), one.sums("row_grams", name, at))
                for change, weight, one in weighed
            ])  # fmt: skip

        return part, rest

    return _variant(f"kfac {damping:g} at {at}", parts)


def _curvature(text: ExpertText, name: str, at: str) -> Curvature:
    return Curvature(text.sums("outputs", name, at), text.sums("inputs", name, at))


def _curvature_svd(
    task: str,
    density: float,
    pair: Pair,
    base: StateDict,
    experts: Sequence[StateDict],
    text: Texts,
    device: str,
    damping: float = 0.1,
) -> StateDict:
    names = [name for name, value in base.items() if _is_layer(name, value)]
    changes = [experts[0][name].double() - base[name].double() for name in names]
    curvatures = [_curvature(text()[task], name, "expert") for name in names]
    found = dict(zip(names, curvature_svd(changes, curvatures, density, damping), strict=True))
    return merged_tensors(base, experts, lambda name, own: found[name], _mean)


def _elsewhere(at: str) -> str:
    """Where a peer measures, in the name of a setting: nothing for the expert, where it does as published."""
    return "" if at == "expert" else f" at {at}"


def _regmean_along(weighing: str, rest: str) -> Variant:
    def merged(pair: Pair, base: StateDict, experts: Sequence[StateDict], text: Texts, device: str) -> StateDict:
        return regmean_along(
            load(pair.trained.base, device),
            base,
            experts,
            [one.rows for one in text().values()],
            _weights(text(), weighing),
            _rest(text, rest, weighing),
        )

    return _folder(f"regmean++ {weighing} {rest}", merged)


def regmean_along(
    model: torch.nn.Module,
    base: StateDict,
    experts: Sequence[StateDict],
    rows: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[float],
    rest: Part,
) -> dict[str, Tensor]:
    """RegMean++ (arXiv 2508.03121): block by block, each expert's inputs are those behind the blocks merged so far.

    Args:
        model: any model of their kind; its weights are replaced.
        base, experts: all tensors of each.
        rows: each expert's text.
        weights: each expert's weight, as for `regression_mean`.
        rest: what becomes of everything that is no linear layer of a block.
    """
    merged = merged_tensors(base, experts, lambda name, own: torch.zeros_like(own[0]), rest)
    for layer in range(len(model.model.layers)):
        under = f"model.layers.{layer}."
        grams = []
        for expert, own_rows in zip(experts, rows, strict=True):
            own = {
                name: expert[name] if name.startswith(under) and _is_layer(name, value) else value
                for name, value in merged.items()
            }
            model.load_state_dict(own, strict=False)
            model.tie_weights()
            with first_blocks(model, layer + 1), input_grams(model, under) as found, torch.no_grad():
                for row in own_rows:
                    model.model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
            grams.append(found())

        def part(name: str, own: Changes, grams=grams) -> Tensor:
            return regression_mean(own, [one[name] for one in grams], weights)

        block = {name: value for name, value in base.items() if name.startswith(under)}
        merged |= merged_tensors(block, experts, part, rest)
    return merged


@contextmanager
def first_blocks(model: torch.nn.Module, count: int) -> Iterator[None]:
    """Let a model end after so many blocks."""
    layers = model.model.layers
    model.model.layers = layers[:count]
    try:
        yield
    finally:
        model.model.layers = layers


def _weights(text: Mapping[str, ExpertText], weighing: str) -> list[float]:
    return [one.weight if weighing == "by gain" else 1.0 for one in text.values()]


def _mean(name: str, own: Changes) -> Tensor:
    return sum(own) / len(own)


def _rest(text: Texts, rest: str, weighing: str, at: str = "expert") -> Part:
    """What becomes of embeddings and norms: their mean, or this project's guided mean of them."""
    if rest == "mean":
        return _mean

    def guided(name: str, own: Changes) -> Tensor:
        squares = [one.sums("squares", name, at) for one in text().values()]
        axes = [row_column_factors(F) if F.dim() == 2 else (F,) for F in squares]
        weighed = zip(own, _weights(text(), weighing), axes, strict=True)
        return guided_mean(torch.zeros_like(own[0]), [WeighedModel(*one) for one in weighed], power=0.5, floor=0.1)

    return guided


def _wanda(text: ExpertText, density: float) -> Part:
    return lambda name, own: wanda(own[0], text.expert.inputs[name].diagonal(), density)


def _variant(name: str, parts: Callable[[Texts], tuple[Part, Part]], tasks: Sequence[str] = ()) -> Variant:
    """A peer that makes each tensor by itself: what becomes of linear layers, and of the rest."""

    def merged(pair: Pair, base: StateDict, experts: Sequence[StateDict], text: Texts, device: str) -> StateDict:
        return merged_tensors(base, experts, *parts(text))

    return _folder(name, merged, tasks)


def _folder(name: str, merged: Callable[..., StateDict], tasks: Sequence[str] = ()) -> Variant:
    def folder(pair: Pair, device: str) -> Path:
        experts = [path for task, path in pair.trained.experts.items() if not tasks or task in tasks]
        target = pair.folder / f"peers_{CODE_VERSION}" / name
        if not target.exists():
            with pair.clock.work(f"peer {name}"), staged_folder(target) as stage:
                base, *others = (load_file(path / WEIGHTS, device) for path in (pair.trained.base, *experts))
                shutil.copytree(pair.trained.base, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
                found = merged(pair, base, others, lambda: _texts_of(pair, device), device)
                written = {key: value.to(torch.bfloat16).cpu().contiguous() for key, value in found.items()}
                save_file(written, stage / WEIGHTS, metadata={"format": "pt"})
        return target

    return Variant(name, folder)


_LAST: dict[Path, Mapping[str, ExpertText]] = {}


def _texts_of(pair: Pair, device: str) -> Mapping[str, ExpertText]:
    """The experts of a pair with their text, measured once; those of one pair at a time are kept."""
    if pair.folder not in _LAST:
        _LAST.clear()
        _LAST[pair.folder] = expert_texts(pair, device)
    return _LAST[pair.folder]


def merged_tensors(base: StateDict, experts: Sequence[StateDict], layers: Part, rest: Part) -> dict[str, Tensor]:
    """A model's tensors, float64: the base and what becomes of the changes of its linear layers, and of the rest."""
    merged = {}
    for name, value in base.items():
        own = [expert[name].double() - value.double() for expert in experts]
        change = layers(name, own) if _is_layer(name, value) else rest(name, own)
        merged[name] = value.double() + change
    return merged


def _is_layer(name: str, value: Tensor) -> bool:
    return value.dim() == 2 and "proj" in name
