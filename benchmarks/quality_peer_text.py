"""What peers of the quality benchmark read from text: losses, squared gradients and input Grams, by plain dense passes.

The model is whole in memory, in float32, and computes everything by its own forward and `autograd`: written without
what the commands measure with, so that the two can be held against each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.quality_pairs import Pair
from utils.pair.calibration import choose_samples
from utils.pair.tokens import encode

BLOCKS = "model.layers."  # what the names of parameters inside the blocks start with
Rows: TypeAlias = Sequence[Sequence[int]]
Grams: TypeAlias = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class TextSums:
    """One model on one text. `loss` is the mean over predicted tokens, nats.

    `squares` are, by parameter, sums over samples of squared gradients of the samples' mean losses (float32); `inputs`
    the mean of x x' over the tokens that each linear layer of a block is given, by the name of its weight (float64),
    `outputs` the mean of g g' over the gradients of its outputs, each of the sum of a sample's token losses. `row_grams` are,
    for every other matrix, sums over samples and rows of g g', g a row of the gradient of the mean loss.
    """

    loss: float
    squares: Mapping[str, Tensor] = field(repr=False)
    inputs: Mapping[str, Tensor] = field(repr=False)
    outputs: Mapping[str, Tensor] = field(repr=False)
    row_grams: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class ExpertText:
    """An expert and its calibration text: what expert and base make of it, and its weight beside others, 1 / gain.

    `base` measures when it is first asked.
    """

    rows: Rows = field(repr=False)
    expert: TextSums
    base: Callable[[], TextSums] = field(repr=False)
    weight: float

    def sums(self, kind: str, name: str, at: str) -> Tensor:
        """A field of `TextSums` for a parameter, at the `expert`, at the `base`, or the sum of both (`both`)."""
        return sum(getattr(one, kind)[name] for one in self._at(at))

    def _at(self, at: str) -> list[TextSums]:
        if at == "expert":
            return [self.expert]
        return [self.base()] if at == "base" else [self.expert, self.base()]


def expert_texts(pair: Pair, device: str) -> dict[str, ExpertText]:
    """Every expert of a pair with its own calibration text, the samples that command 1 measures on.

    Raises:
        ValueError: an expert gains nothing over the base on its text.
    """
    found = {}
    for task, rows in calibration_rows(pair).items():
        sums = text_sums(load(pair.trained.experts[task], device), rows)
        before = mean_of_losses(load(pair.trained.base, device), rows)
        base = cache(partial(_sums_of, pair.trained.base, device, rows))
        if not sums.loss < before:
            raise ValueError(f"{task}: no gain to weigh by ({before} at the base, {sums.loss} at the expert)")
        found[task] = ExpertText(rows, sums, base, 1 / (before - sums.loss))
    return found


def calibration_rows(pair: Pair) -> dict[str, list[list[int]]]:
    """Token ids of every task's calibration samples."""
    from transformers import AutoTokenizer

    config, found = pair.configs[pair.both], {}
    for task in pair.trained.experts:
        source = config.text_of(task)
        tokenizer = AutoTokenizer.from_pretrained(pair.trained.experts[task])
        found[task] = encode(choose_samples(source, config.nsamples), tokenizer, source.seqlen, task)
    return found


def load(folder: Path, device: str = "cpu") -> nn.Module:
    """A causal language model in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def _sums_of(folder: Path, device: str, rows: Rows) -> TextSums:
    return text_sums(load(folder, device), rows)


def text_sums(model: nn.Module, rows: Rows) -> TextSums:
    """Take every sample forward and back by itself."""
    total, squares = [], {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    row_grams: dict[str, Tensor] = {}
    with input_grams(model) as inputs, output_grams(model) as outputs:
        for row in rows:
            loss, predicted = sample_loss(model, row), len(row) - 1
            model.zero_grad()
            (predicted * loss).backward()  # of the sum: a token's gradient does not hang on the length of its sample
            total.append(loss.item())
            for name, value in model.named_parameters():
                squares[name].addcmul_(value.grad, value.grad, value=predicted**-2)
                if value.dim() == 2 and not name.startswith(BLOCKS):
                    gradient = value.grad.double() / predicted
                    row_grams[name] = row_grams.get(name, 0) + gradient.t() @ gradient
    model.zero_grad()
    return TextSums(_over_tokens(total, rows), squares, inputs(), outputs(), row_grams)


def mean_of_losses(model: nn.Module, rows: Rows) -> float:
    """Mean loss over all predicted tokens of all rows."""
    with torch.inference_mode():
        return _over_tokens([sample_loss(model, row).item() for row in rows], rows)


def sample_loss(model: nn.Module, row: Sequence[int]) -> Tensor:
    """The mean loss of one row's next tokens."""
    ids = torch.tensor([row], device=next(model.parameters()).device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def input_grams(model: nn.Module, under: str = BLOCKS) -> AbstractContextManager[Grams]:
    """Watch what linear layers are given, those whose names start with `under`: the mean of x x' over tokens so far."""
    return _grams(model, under, lambda module, see: module.register_forward_pre_hook(lambda _, given: see(given[0])))


def output_grams(model: nn.Module, under: str = BLOCKS) -> AbstractContextManager[Grams]:
    """Watch the gradients of what linear layers return, on the way back: the mean of g g' over tokens so far."""
    return _grams(model, under, lambda module, see: module.register_full_backward_hook(lambda *came: see(came[2][0])))


@contextmanager
def _grams(model: nn.Module, under: str, attach: Callable) -> Iterator[Grams]:
    """Means of the outer products of the vectors that a hook sees, float64, by the name of a layer's weight."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, seen: Tensor) -> None:
        x = seen.detach().flatten(0, -2).double()
        totals[name] = totals.get(name, 0) + x.t() @ x
        counts[name] = counts.get(name, 0) + len(x)

    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    handles = [attach(module, partial(see, f"{name}.weight")) for name, module in layers if name.startswith(under)]
    try:
        yield lambda: {name: total / counts[name] for name, total in totals.items()}
    finally:
        for handle in handles:
            handle.remove()


def _over_tokens(losses: Sequence[float], rows: Rows) -> float:
    predicted = [len(row) - 1 for row in rows]
    return math.fsum(n * loss for n, loss in zip(predicted, losses, strict=True)) / sum(predicted)
