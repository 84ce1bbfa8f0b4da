"""A merge as an adapter for peft (LoRA, arXiv 2106.09685): what it changes about the base, in factors where that is low rank.

| what the merge changes | in the adapter |
|---|---|
| a linear layer, by a change of low rank | `lora_A` [k, in] and `lora_B` [out, k] of its own rank, scaled by 1 |
| embeddings, heads, norms, whole layers outside the blocks | the module as it becomes (`modules_to_save`) |

The merge is computed in float32, tensor by tensor, so that its changes have the rank that the recipe asks for: rounded to
16 bits no sum of base and change has. Factors are those of the truncated SVD, float32.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.errors import UserError
from utils.merging.merged_tensors import MergeWork, merged_tensors, prepare
from utils.merging.planning import PlannedMerge
from utils.models.adapters import CONFIG, WEIGHTS
from utils.models.checkpoints import TensorHeader
from utils.models.decoder import is_experts, is_linear, is_transposed
from utils.models.stored_layout import StoredLayout, stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.publishing.manifest import to_json
from utils.runtime import gigabytes

_PREFIX = "base_model.model."  # before a parameter's name in an adapter's file
_ROUNDING = 2e-7  # of float32, in units of the merged tensor's norm
_LEAST = 1e-6  # of a change's norm that may be left out


def low_rank_parts(change: Tensor, most_left: float) -> tuple[Tensor, Tensor] | None:
    """The two factors of a change [out, in] that leave out no more than a norm; None if they hold more numbers than it.

    Returns:
        float32 `A` [k, in] and `B` [out, k], where B A is the change, k at least 1.
    """
    out, width = change.shape
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = max(1, int((tails > most_left).sum()))
    if rank * (out + width) > out * width:
        return None
    roots = values[:rank].sqrt()
    return (roots[:, None] * right[:rank]).float(), (left[:, :rank] * roots).float()


@dataclass
class _Adapter:
    """What is collected of an adapter: its tensors, the rank of each layer, modules that are kept whole."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def add_layer(self, module: str, turned: bool, before: Tensor, after: Tensor) -> None:
        """Factors of a linear layer's change."""
        change = after - before
        most_left = max(_LEAST * float(change.norm()), _ROUNDING * float(after.norm()))
        parts = low_rank_parts(change.t() if turned else change, most_left)
        if parts is None:
            raise UserError(
                f"this merge cannot be an adapter: the change to {module} is not of low rank; make the recipe with --guidance "
                "gram_mean --form low_rank --mean_density 0.1, for one expert, or merge without --adapter",
                "adapter-not-low-rank",
            )
        self.ranks[module] = len(parts[0])
        for end, part in zip(("lora_A", "lora_B"), parts, strict=True):
            self.tensors[f"{_PREFIX}{module}.{end}.weight"] = part.contiguous()

    def add_whole(self, module: str, own: str, after: Tensor, changes: bool) -> None:
        """One parameter of a module that is kept as it becomes, if any of its parameters changes."""
        self.whole.setdefault(module, {})[own] = after
        if changes:
            self.changed.add(module)

    def settle(self, tied: Sequence[str]) -> None:
        """Leave out modules that stay as they are; of `tied` modules each has the changed weight for its own."""
        self.whole = {module: own for module, own in self.whole.items() if module in self.changed}
        for module in {*tied} & {*self.whole}:
            self.whole |= dict.fromkeys(tied, self.whole[module])
        for module, own in self.whole.items():
            self.tensors |= {f"{_PREFIX}{module}.{name}": value.clone() for name, value in own.items()}


def write_adapter(ready: PlannedMerge, folder: Path, say: Callable[[str], None]) -> str:
    """Merge, tensor by tensor, and write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        ready: the merge of a recipe in float32 (`recipe_file.in_float32`).
        folder: where to write.
        say: takes a line before the merge: what embeddings may take.

    Returns:
        A line about what was written.

    Raises:
        UserError: the merge changes what no adapter can hold, or linear layers by more than a low rank.
    """
    fitting = _fitting(ready)
    model, stored = fitting.model, fitting.stored
    base, dtype = ready.plan.inputs.donor.checkpoint, getattr(torch, ready.plan.inputs.donor.checkpoint.float_dtype)
    ends = [name for name, one in model.named_modules() if one in _ends(model)]
    if whole := [one for one in ends if f"{one}.weight" in stored]:
        say(_said_of_ends([stored[f"{one}.weight"] for one in whole], len(ends) // len(whole), dtype.itemsize))
    found, layers = _Adapter(), {name: one for name, one in model.named_modules() if is_linear(one)}
    work = prepare(ready)
    for name, before, after in _tensors(work, fitting.names, fitting.headers):
        (module, _, own), changes = name.rpartition("."), not torch.equal(before, after)
        if module not in layers or module in ends:
            found.add_whole(module, own, after.to(dtype), changes)
        elif changes and own == "weight":
            found.add_layer(module, is_transposed(layers[module]), before, after)
        elif changes:
            raise UserError(
                f"this merge cannot be an adapter: {name}, the bias of a linear layer, changes, which factors cannot express; "
                "merge without --adapter",
                "adapter-unfit",
            )
    found.settle([] if all(f"{name}.weight" in stored for name in ends) else ends)
    _write(found, base.name, layers, folder)
    ranks = sorted(found.ranks.values()) or [0]
    return (
        f"adapter: {len(found.ranks)} layers of rank {ranks[0]} to {ranks[-1]}, {len(found.whole)} modules whole; "
        f"{sum(one.numel() for one in found.tensors.values()) / 1e6:,.1f} M numbers"
    )


def _said_of_ends(headers: Sequence[TensorHeader], times: int, itemsize: int) -> str:
    taken = gigabytes(times * itemsize * sum(math.prod(one.shape) for one in headers))
    twice = ", tied ones twice, as peft loads them" if times > 1 else ""
    factors = ", ".join([*(f"{{filter: {one.name}, value: 0}}" for one in headers), "{value: 1}"])
    return (
        f"adapter: embeddings and head are kept whole where the recipe changes them, {taken}{twice}; to leave them as the base "
        f"has them, give each expert of a gram_mean recipe this parameter:\n  factor: [{factors}]"
    )


@dataclass(frozen=True)
class _Fitting:
    """What an adapter of a merge is about: the base's class, its stored tensors by parameter, and of the merge's tensors, by
    their names there, what the base stores and the parameter that this is."""

    model: nn.Module
    stored: Mapping[str, TensorHeader]
    headers: Mapping[str, TensorHeader]
    names: Mapping[str, str]


def check_adapter_fits(ready: PlannedMerge) -> None:
    """Refuse, by headers alone, a merge that changes what no adapter can hold.

    Raises:
        UserError: experts of a mixture, or tensors that the model has otherwise than they are stored.
    """
    _fitting(ready)


def _fitting(ready: PlannedMerge) -> _Fitting:
    base, reference = ready.plan.inputs.donor.checkpoint, ready.plan.inputs.config.base_model
    model = build_skeleton(base, torch.float32, ready.settings.trust_remote_code)
    layout = stored_layout(model, base)
    experts = _expert_tensors(model, layout)
    parameters = {header.name: name for name, header in layout.direct.items()}
    headers: dict[str, TensorHeader] = {}
    for tensor in ready.plan.tensors:
        header = tensor.sources.get(reference)
        if header is not None and header.name in experts:
            raise UserError(
                f"{tensor.name}: experts of a mixture are stacked in one parameter of the model, which is not a linear layer, "
                "and adapters written here change linear layers alone; merge without --adapter",
                "adapter-of-mixture",
            )
        if header is None or tensor.shape != header.shape or header.name not in parameters:
            raise UserError(
                f"{tensor.name}: the base does not store it as the model has it, so an adapter cannot change it; merge "
                "without --adapter",
                "adapter-unfit",
            )
        headers[tensor.name] = header
    return _Fitting(model, layout.direct, headers, {name: parameters[header.name] for name, header in headers.items()})


def _tensors(
    work: MergeWork, names: Mapping[str, str], headers: Mapping[str, TensorHeader]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name in the model, base and merge of every tensor of floating point, float32."""
    weights = StreamedWeights(StoredLayout(headers, (), (), ()), torch.device("cpu"), torch.float32)
    try:
        for name in headers:
            after = merged_tensors([work], [name])[0].get(name)
            if after is None or not after.is_floating_point():
                continue
            yield names[name], weights.fetch([name])[name], after.cpu().float()
    finally:
        weights.close()


def _expert_tensors(model: nn.Module, layout: StoredLayout) -> set[str]:
    """The stored names of the matrices of all mixtures' experts, stored apart or stacked."""
    modules = [(path, one) for path, one in model.named_modules() if is_experts(one)]
    return {name for path, one in modules for own, _ in one.named_parameters(path) for name in layout.stored_names(own)}


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _write(found: _Adapter, base: str, layers: Mapping[str, nn.Module], folder: Path) -> None:
    most = max(found.ranks.values(), default=1)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": found.ranks,
        "alpha_pattern": found.ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(layers[name]) for name in found.ranks),
        "target_modules": sorted(found.ranks),
        "modules_to_save": sorted(found.whole) or None,
    }
    (folder / CONFIG).write_bytes(to_json(config))
    save_file(found.tensors, folder / WEIGHTS, metadata={"format": "pt"})
