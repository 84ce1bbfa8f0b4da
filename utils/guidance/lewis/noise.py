"""How much of LEWIS's deltas is rounding, where the forward pass is in 16 bits: some samples once more in float32.

A delta is the difference of two nearly equal norms, so that the rounding of hidden states, which moves a norm by less than
a thousandth, may be a good part of it. Weights are used as they are and sums are float32 or better: what rounds are the
outputs of the blocks' own operations, and what one block rounds goes on through all that follow. So a few samples go
through each block beside the text, in the model's dtype and in float32, with the same weights, and

    noise = | (I_expert - I_base) in 16 bits - (I_expert - I_base) in float32 | / | I_expert - I_base | in float32

is what rounding makes of a tensor's delta on them; over more samples it averages out further.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from utils.guidance.lewis.norms import metric_norm
from utils.models.decoder import Decoder, weight_matrix
from utils.models.weight_source import placed
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import KeptVisitor, block_tensor_names, body_names, on_device
from utils.passes.flows import Flow, stops
from utils.passes.second_moments import SecondMoments

SAMPLES = 2  # of a text
_NOISY = 0.1  # share of a delta that is rounding, from which on a warning says so

Noise = Mapping[tuple[int, str], float]  # by layer and component
Norms = Mapping[tuple[int, str], tuple[float, float]]  # by layer and component: in the model's dtype, in float32


def relative_noise(expert: Norms, base: Norms) -> dict[tuple[int, str], float]:
    """The share of each delta that is rounding, by layer and component; 1 where float32 sees no delta at all."""
    found = {}
    for place, (rounded, exact) in expert.items():
        delta, gap = exact - base[place][1], abs((rounded - base[place][0]) - (exact - base[place][1]))
        found[place] = gap / abs(delta) if delta else float(gap > 0)
    return found


def noise_note(name: str, noise: Noise, rounded: float, exact: float) -> str:
    """How much of an expert's deltas is rounding, and what float32 costs, from the seconds of both ways."""
    return (
        f"{name}: rounding of the forward pass makes up to {max(noise.values()):.1%} of a delta (median "
        f"{statistics.median(noise.values()):.1%}, on {SAMPLES} samples); in float32 there is none, and the blocks took "
        f"{exact / rounded:.2g} times as long (--dtype float32)"
    )


def noise_warnings(name: str, noise: Noise) -> list[str]:
    """A warning if deltas are to a good part rounding."""
    over = [place for place, value in noise.items() if value > _NOISY]
    if not over:
        return []
    layer, component = max(noise, key=noise.__getitem__)
    return [
        f"{name}: rounding makes more than {_NOISY:.0%} of {len(over)} of {len(noise)} deltas, most ({max(noise.values()):.0%}) "
        f"that of {component} in layer {layer}: densities there are partly chance; measure with --dtype float32"
    ]


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether a forward pass in a dtype rounds so much that it is tried how much."""
    return dtype.itemsize < torch.float32.itemsize


def trial_batch(batches: Sequence[MicroBatch]) -> MicroBatch:
    """The first samples of a text, without their neighbors."""
    first = batches[0]
    lengths = first.lengths[:SAMPLES]
    mask = None if first.mask is None else first.mask[:SAMPLES]
    return MicroBatch(first.input_ids[:SAMPLES], lengths, mask)


class RoundingTrial:
    """Takes a batch through each block in the model's dtype and in float32; a context manager, entered before the pass.

    `norms` maps (layer, component name) to both norms, float64 scalar tensors on the device; `seconds` are what both ways
    took inside the blocks. Where blocks are pruned, `measure` one, let it be pruned, then `advance`.

    Args:
        decoder: the model that `run_blocks` takes through its blocks.
        batch: the trial samples.
        device: where to compute.
    """

    def __init__(self, decoder: Decoder, batch: MicroBatch, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.decoders = (decoder, decoder.copied())  # on the meta device: nothing is copied but modules
        self.norms: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self.seconds = [0.0, 0.0]
        self._passed = 0  # blocks
        self.given_up = False
        self._flows: list[Flow] = []
        self._open = ExitStack()

    def __enter__(self) -> "RoundingTrial":
        """Nothing runs yet."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End both passes."""
        self._open.close()

    def give_up(self) -> None:
        """End both ways; nothing was tried then."""
        self.given_up = True
        self.norms.clear()
        self._flows.clear()
        self._open.close()

    def measure(self, layer: int, block: nn.Module) -> None:
        """Take both norms of every linear component of a block, whose weights are in place."""
        if self.given_up:
            return
        if not self._flows:
            self._start()
        components, found = [one for one in self.decoders[0].components_of(layer) if not one.is_stacked], []
        for way, flow in enumerate(self._flows):
            flow.expect(layer)
            module = self.decoders[way].blocks[layer]
            moments = SecondMoments([component.path for component in components])
            with self._weights(way, layer, block), moments.attached(module):
                moments.begin(flow.batch)
                start = self._clock()
                flow.rehearse()
                self.seconds[way] += self._clock() - start
            sums = moments.checked(layer, self.batch.tokens, passing_over=True)
            found.append({path: own / self.batch.tokens for path, own in sums.items()})
        for component in (one for one in components if one.path in found[0]):
            weight = weight_matrix(block.get_submodule(component.path))
            both = tuple(metric_norm(weight, one[component.path]) for one in found)
            self.norms[layer, component.name] = both

    def advance(self, layer: int, block: nn.Module) -> None:
        """Take both ways through the block as it is now."""
        self._passed = layer + 1
        if self.given_up or layer + 1 == len(self.decoders[0].blocks):
            return  # what comes behind the blocks is not measured
        for way, flow in enumerate(self._flows):
            with self._weights(way, layer, block):
                flow.advance()

    def state(self) -> dict[str, Any]:
        """Where both ways stand between two blocks, and what was measured, as plain data and tensors."""
        norms = [(layer, name, *both) for (layer, name), both in self.norms.items()]
        outputs = [flow.returned for flow in self._flows]
        return {
            "norms": norms,
            "seconds": list(self.seconds),
            "passed": self._passed,
            "outputs": outputs,
            "given_up": self.given_up,
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take that up again, in a pass that stands there; the blocks before seem to return what the last of them did."""
        self.norms = {(layer, name): tuple(one.to(device) for one in both) for layer, name, *both in state["norms"]}
        self.seconds = list(state["seconds"])
        self._passed = state["passed"]
        if state["given_up"]:
            self.give_up()
            return
        self._start()
        for flow, output in zip(self._flows, state["outputs"], strict=True):
            for layer in range(self._passed):
                flow.expect(layer)
                flow.advance_with(on_device(output, device))

    def _start(self) -> None:
        """Both ways up to the first block; the embeddings in float32 are there just for that."""
        ours, exact = self.decoders
        in_blocks = block_tensor_names(ours)
        named = dict([*ours.model.named_parameters(), *ours.model.named_buffers()])
        outside = {name: _exact(named[name]) for name in body_names(exact) if name not in in_blocks}
        self._open.enter_context(stops(exact.blocks))
        for decoder in self.decoders:
            flow = Flow(decoder.body, self.batch, self.device)
            self._open.callback(flow.close)
            self._flows.append(flow)
        self._flows[0].advance()
        with placed(exact.model, "", outside, self.device):
            self._flows[1].advance()

    def _weights(self, way: int, layer: int, block: nn.Module):
        """The block's weights in float32 for the exact way; they are in place already for the other."""
        stack = ExitStack()
        if way == 1:
            named = [*block.named_parameters(), *block.named_buffers()]
            stack.enter_context(
                placed(self.decoders[1].blocks[layer], "", {name: _exact(value) for name, value in named}, self.device)
            )
        return stack

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class VisitorWithTrial:
    """A visitor of blocks with a trial beside it (a `block_runner.KeptVisitor`)."""

    def __init__(self, visitor: KeptVisitor, trial: RoundingTrial) -> None:
        self.visitor, self.trial = visitor, trial

    @property
    def rewrites(self) -> bool:
        """As the visitor."""
        return self.visitor.rewrites

    def observing(self, layer: int, block: nn.Module) -> AbstractContextManager[None]:
        """As the visitor."""
        return self.visitor.observing(layer, block)

    def begin(self, batch: MicroBatch) -> None:
        """As the visitor."""
        self.visitor.begin(batch)

    def state(self) -> dict[str, Any]:
        """Both their states."""
        return {"visitor": self.visitor.state(), "trial": self.trial.state()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take both up again."""
        self.trial.restore(state["trial"], device)
        self.visitor.restore(state["visitor"], device)

    def finish(self, layer: int, block: nn.Module) -> None:
        """The trial measures the block before the visitor may prune it, and goes through it as it is then.

        A block that is not there whole (`utils/passes/experts_in_parts.py`) ends the trial.
        """
        if any(value.device.type == "meta" for value in block.parameters()):
            self.trial.give_up()
        self.trial.measure(layer, block)
        self.visitor.finish(layer, block)
        self.trial.advance(layer, block)


def _exact(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
