"""What peers of the quality benchmark read from text: losses, squared gradients and input Grams, by plain dense passes.

The model is whole in memory, in float32, and computes everything by its own forward and `autograd`: written without
what the commands measure with, so that the two can be held against each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality_pairs import Pair
from utils.pair.calibration import choose_samples
from utils.pair.tokens import encode

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TextSums:
    """One model on one text. `loss` is the mean over predicted tokens, nats.

    `squares` are, by parameter, sums over samples of squared gradients of the samples' mean losses (float32); `inputs`
    the mean of x x' over the tokens that each linear layer of a block is given, by the name of its weight (float64).
    """

    loss: float
    squares: Mapping[str, Tensor] = field(repr=False)
    inputs: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class ExpertText:
    """An expert and its calibration text: what expert and base make of it, and its weight beside others, 1 / gain.

    `base` measures when it is first asked.
    """

    rows: Rows = field(repr=False)
    expert: TextSums
    base: Callable[[], TextSums] = field(repr=False)
    weight: float

    def squares(self, name: str, at: str) -> Tensor:
        """Squared gradients of a parameter at the `expert`, at the `base`, or their sum (`both`)."""
        return sum(one.squares[name] for one in self._at(at))

    def inputs(self, name: str, at: str) -> Tensor:
        """The mean of x x' of a layer's inputs, likewise."""
        return sum(one.inputs[name] for one in self._at(at))

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
    with input_grams(model) as inputs:
        for row in rows:
            loss = sample_loss(model, row)
            model.zero_grad()
            loss.backward()
            total.append(loss.item())
            for name, value in model.named_parameters():
                squares[name].addcmul_(value.grad, value.grad)
    model.zero_grad()
    return TextSums(_over_tokens(total, rows), squares, inputs())


def mean_of_losses(model: nn.Module, rows: Rows) -> float:
    """Mean loss over all predicted tokens of all rows."""
    with torch.inference_mode():
        return _over_tokens([sample_loss(model, row).item() for row in rows], rows)


def sample_loss(model: nn.Module, row: Sequence[int]) -> Tensor:
    """The mean loss of one row's next tokens."""
    ids = torch.tensor([row], device=next(model.parameters()).device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@contextmanager
def input_grams(model: nn.Module, under: str = "model.layers.") -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Watch the linear layers whose names start with `under`; what is given gives the means by weight so far."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, module: nn.Linear):
        def observe(_, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2).double()
            totals[name] = totals.get(name, 0) + x.t() @ x
            counts[name] = counts.get(name, 0) + len(x)

        return module.register_forward_pre_hook(observe)

    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    handles = [watch(f"{name}.weight", module) for name, module in layers if name.startswith(under)]
    try:
        yield lambda: {name: total / counts[name] for name, total in totals.items()}
    finally:
        for handle in handles:
            handle.remove()


def _over_tokens(losses: Sequence[float], rows: Rows) -> float:
    predicted = [len(row) - 1 for row in rows]
    return math.fsum(n * loss for n, loss in zip(predicted, losses, strict=True)) / sum(predicted)
