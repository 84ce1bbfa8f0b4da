"""What each expert's weights change about the output of one part of the base, on the inputs that the base gives it.

Delta_s(x) = f(x; theta_s) - f(x; theta_0),   x as in the base's own pass, in float32
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn

from utils.errors import UserError
from utils.guidance.submodule_linearity.gram import gram_matrices, token_rows
from utils.guidance.submodule_linearity.nonlinearity import GRID, distance_sums, nonlinearity
from utils.models.decoder import is_linear, weight_matrix
from utils.models.weight_source import placed
from utils.passes.mixed_stacks import between, differ
from utils.passes.shared_state import with_copies


@dataclass(frozen=True)
class Passage:
    """A micro-batch on its way through the base: which text it belongs to, and which of its tokens are real.

    `folds` is the fold of each of its samples (`utils/guidance/submodule_linearity/folds.py`), int64 on the device;
    `scored` are the experts whose non-linearity is taken on it.
    """

    text: int
    samples: int
    length: int
    mask: torch.Tensor | None
    folds: torch.Tensor
    scored: tuple[int, ...] = ()

    def rows(self, output: Any, what: str) -> torch.Tensor:
        """What a module returned for it, one float32 row per token, zero for pads (`token_rows`)."""
        while isinstance(output, (tuple, list)):  # attention returns its weights beside its output
            output = output[0]
        return token_rows(output, self.samples, self.length, self.mask, what)


@dataclass
class PartChanges:
    """What was measured of a part.

    Attributes:
        levels: the levels at which it is a part (`utils/guidance/submodule_linearity/parts.py`).
        layer: -1 before the blocks, the number of blocks behind them.
        name: path inside the block, or in the model.
        parameters: full names in the model.
        sums: Gram matrices [texts, folds, experts, experts] float64, sums over the tokens of a fold, on the device.
        distances: by expert, `distance_sums` over the expert's own text, on the device.
        calls: how often it was seen.
    """

    levels: tuple[str, ...]
    layer: int
    name: str
    parameters: tuple[str, ...]
    sums: torch.Tensor
    distances: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: int = 0

    def grams(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gram matrices [texts, experts, experts] as means per token; `tokens` are float64 [texts, folds].

        A fold without tokens counts nothing.
        """
        return self.sums.sum(dim=1) / tokens.sum(dim=1)[:, None, None]

    @property
    def scores(self) -> dict[int, float]:
        """Non-linearity by expert."""
        return {expert: nonlinearity(sums) for expert, sums in self.distances.items()}

    def require_calls(self, expected: int, where: str) -> None:
        """Raise a `UserError` unless the part was called once for each micro-batch."""
        if self.calls != expected:
            refuse_calls(self.calls, expected, where)


def refuse_calls(calls: int, expected: int, where: str) -> NoReturn:
    """Raise a `UserError`: a part is not called once for each text."""
    often = "never" if calls == 0 else f"{calls} times"
    raise UserError(
        f"{where} is called {often} in {expected} passes of text through the model; parts that do not process each text once "
        "cannot be weighed: use another --guidance, such as gram_mean",
        "model-unsupported",
    )


@dataclass(frozen=True)
class Call:
    """A call of a part that the base made, and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def made_by(self, module: nn.Module) -> Any:
        """What another module returns for the same arguments; it leaves nothing in them for later blocks."""
        args, kwargs = with_copies(self.args, self.kwargs)
        return module(*args, **kwargs)


@dataclass(frozen=True)
class Variant:
    """An expert's version of a part: a module like the base's, in which the expert's weights are.

    `owner` holds the module; tensors are placed in it by names relative to it. `base` and `own` are the part's
    parameters, the base's and the expert's, by these names; `around` the module's other ones, the base's.
    """

    module: nn.Module
    owner: nn.Module
    base: Mapping[str, torch.Tensor]
    own: Mapping[str, torch.Tensor]
    around: Mapping[str, torch.Tensor]

    @cached_property
    def changed(self) -> torch.Tensor:
        """Whether any parameter differs from the base's (a bool on the device, so that nothing waits)."""
        return torch.stack([differ(value, self.own[name]) for name, value in self.base.items()]).any()


def observe(part: PartChanges, call: Call, variants: Sequence[Variant], passage: Passage, scored: bool) -> None:
    """Add one call to what is known of a part.

    Args:
        part: is added to.
        call: the base's call.
        variants: of each expert.
        passage: the micro-batch.
        scored: whether non-linearity is taken.

    Raises:
        UserError: the part's output has no axis of tokens.
    """
    base_rows = None
    linear = is_linear(call.module) and not variants[0].around
    if scored or not linear:
        base_rows = passage.rows(call.output, part.name)
    changes = []
    for variant in variants:
        if linear:
            changes.append(passage.rows(linear_change(call, variant.module), part.name))
        else:
            rows = passage.rows(_evaluated(variant, call, {}), part.name)
            # Equal weights give exactly 0, whatever two kernels make of differently aligned memory.
            changes.append(torch.where(variant.changed, rows - base_rows, 0.0))
    part.sums[passage.text].index_add_(0, passage.folds, gram_matrices(changes, passage.samples))
    part.calls += 1
    if not scored:
        return
    for expert in passage.scored:
        between = [passage.rows(_interpolated(variants[expert], call, share), part.name) for share in GRID[1:-1]]
        outputs = [base_rows, *between, base_rows + changes[expert]]
        sums = distance_sums(outputs)
        part.distances[expert] = part.distances[expert] + sums if expert in part.distances else sums


def linear_change(call: Call, module: nn.Module) -> torch.Tensor:
    """The change of a linear map's output: (W_s - W_0) x + (b_s - b_0), exact up to one float32 product.

    Args:
        call: the base's call of its linear map.
        module: the expert's.
    """
    inputs = call.args[0] if call.args else next(iter(call.kwargs.values()))
    weight = weight_matrix(module).float() - weight_matrix(call.module).float()
    bias = None if call.module.bias is None else module.bias.float() - call.module.bias.float()
    return nn.functional.linear(inputs.float(), weight, bias)


def _interpolated(variant: Variant, call: Call, share: float) -> Any:
    return _evaluated(
        variant, call, {name: between(value, variant.own[name], share) for name, value in variant.base.items()}
    )


def _evaluated(variant: Variant, call: Call, replaced: Mapping[str, torch.Tensor]) -> Any:
    tensors = {**variant.around, **replaced}
    if not tensors:
        return call.made_by(variant.module)
    device = next(one.device for one in (*tensors.values(), *variant.owner.parameters()) if not one.is_meta)
    with placed(variant.owner, "", tensors, device):
        return call.made_by(variant.module)
