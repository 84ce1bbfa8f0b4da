"""The base's own pass through a text, with the same block of every expert beside the base's.

Each block of the base and the experts is fetched once, for all texts together. On the inputs that the base gives to each
of its parts (`parts.py`), each expert's version of the part is evaluated too. Everything is float32: what a fine-tune
changes is so much smaller than the output that bfloat16 would round it away.

Memory: what lies outside the base's blocks, two blocks of the base and of each expert, the hidden states of all texts,
and, for one micro-batch and one part, the outputs of all models. With scores also the hidden states of each expert's own
text six times (`whole_models.py`, `level_fit.py`) and a merged block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from utils.guidance.submodule_linearity.level_fit import held_out_misses
from utils.guidance.submodule_linearity.outside_changes import ComparedModel, OutsideChanges
from utils.guidance.submodule_linearity.part_changes import Call, PartChanges, Passage
from utils.guidance.submodule_linearity.passages import ComparedText, passages_of
from utils.guidance.submodule_linearity.standing import Missed, Standing, as_plain, from_plain
from utils.guidance.submodule_linearity.watched_parts import WatchedPart, around, watched_parts
from utils.guidance.submodule_linearity.whole_models import WholeModels
from utils.models.weight_source import placed, tensor_names
from utils.passes.block_runner import Around, BlocksInTurn, block_tensor_names, caught_up
from utils.passes.flows import Flow, stops
from utils.passes.language_head import behind_body
from utils.passes.snapshots import Snapshots


@dataclass(frozen=True)
class Compared:
    """What `compare_models` measured.

    Attributes:
        parts: of the network, `sums` on the CPU. The head has the inputs that the base's final hidden states give it.
        tokens: float64 [texts, folds].
        whole: non-linearity of the whole model, by expert; empty without scores.
        missed: what a merge of a block at a level misses on text that it was not solved on, by layer, level and expert
            (`utils/guidance/submodule_linearity/level_fit.py`); empty without scores.
    """

    parts: list[PartChanges]
    tokens: torch.Tensor
    whole: dict[int, float]
    missed: Missed

    def grams(self, part: PartChanges) -> torch.Tensor:
        """A part's Gram matrices [texts, experts, experts] as means per token."""
        return part.grams(self.tokens)


@torch.inference_mode()
def compare_models(
    base: ComparedModel,
    experts: Sequence[ComparedModel],
    texts: Sequence[ComparedText],
    device: torch.device,
    *,
    scores: bool,
    on_block: Callable[[int], None] = lambda layer: None,
    snapshots: Snapshots | None = None,
) -> Compared:
    """Measure every part of the base on every text; closes the weight sources.

    Args:
        base, experts: models of one structure, their parameters on the meta device before and after.
        texts: the texts.
        device: where to compute.
        scores: whether to take the non-linearity of blocks, attention, MLPs and whole models, each expert's on its own
            text, and to try merges of each block at every level.
        on_block: called with the layer number after each block.
        snapshots: where the way of all passes is kept; it begins where a killed run's stood.

    Raises:
        UserError: models whose parts differ; parts that do not process each token once.
    """
    comparison = _Comparison(base, experts, texts, device, scores)
    with ExitStack() as stack:
        for model in (base, *experts):
            stack.callback(model.weights.close)
            stack.callback(model.stored.close)
        parts = comparison.run(stack, on_block, snapshots or Snapshots(None))
    for part in parts:
        part.sums = part.sums.cpu()
        part.distances = {expert: sums.cpu() for expert, sums in part.distances.items()}
    return Compared(parts, comparison.tokens, comparison.whole_scores, comparison.missed)


class _Comparison:
    """One run of `compare_models`."""

    def __init__(
        self,
        base: ComparedModel,
        experts: Sequence[ComparedModel],
        texts: Sequence[ComparedText],
        device: torch.device,
        scores: bool,
    ) -> None:
        self.base, self.experts, self.device, self.scores = base, experts, device, scores
        self.decoder = base.decoder
        self.tokens = torch.tensor([text.tokens for text in texts], dtype=torch.float64)
        self.batches, self.passages = passages_of(texts, self.decoder, device)
        self.outside = OutsideChanges(base, experts, self.batches, len(texts), device)
        self.layer = -1
        self.passage: Passage | None = None  # None: what runs is not to be observed
        self.whole_scores: dict[int, float] = {}
        self.missed: Missed = {}
        self.flows: list[Flow] = []  # the base's passes
        self.whole: WholeModels | None = None  # those of interpolated models
        self.parts: list[PartChanges] = []  # of the blocks that are done

    def run(self, stack: ExitStack, on_block: Callable[[int], None], snapshots: Snapshots) -> list[PartChanges]:
        layers = range(len(self.decoder.blocks))
        stack.enter_context(self._base_outside_placed())
        stack.enter_context(stops(self.decoder.blocks))
        stack.callback(self._close)
        with self._outside_observed():
            first = self._begin(snapshots)
            for layer in layers[:first]:
                on_block(layer)
            turns = [
                stack.enter_context(BlocksInTurn(model.decoder, model.weights, layers[first:], self.device))
                for model in (self.base, *self.experts)
            ]
            for layer in layers[first:]:
                self.layer = layer
                with ExitStack() as placing:
                    blocks = [placing.enter_context(turn.next_block()) for turn in turns]
                    for turn in turns:
                        placing.enter_context(turn.experts())
                    self.parts += self._through_block(blocks, self.flows)
                    self.passage = None
                    if self.whole is not None:
                        self.whole.through_block(layer, blocks)
                on_block(layer)
                if layer + 1 < len(layers):
                    flows = self._all_flows()
                    returned = [flow.returned for flow in flows]
                    snapshots.offer(layer + 1, returned, Around(flows), lambda: as_plain(self._standing()))
                    del returned
            finals = [flow.result() for flow in self.flows]
            inputs = self._head_inputs(finals) if self.outside.between else finals
            self.outside.forget()
        if self.whole is not None:
            self.whole_scores = self.whole.scores(finals)
        around = self.outside.checked(len(self.flows))
        before = [part for part in around if part.layer < 0]
        behind = [part for part in around if part.layer >= 0]
        return [*before, *self.parts, *behind, self.outside.head(inputs, self.passages)]

    def _begin(self, snapshots: Snapshots) -> int:
        """Take all passes to where a killed run's stood, or to the first block; the block that they stand at."""
        snapshot = snapshots.load()
        if snapshot is not None:
            standing = from_plain(snapshot.state, self.device)
            self.outside.parts.update(standing.outside)
            self._start(observed=False)
            flows = self._all_flows()
            if len(snapshot.outputs) == len(flows) and caught_up(flows, snapshot, self.device):
                self.parts, self.missed = standing.parts, standing.missed
                self.outside.entered |= standing.entered
                return snapshot.layer
            self.outside.parts.clear()
            self.outside.entered.clear()
        self._start(observed=True)
        return 0

    def _start(self, observed: bool) -> None:
        """Begin all passes and take them to the first block; those of the base are `observed` on their way."""
        self._close()
        self.flows = [Flow(self.decoder.body, batch, self.device) for batch in self.batches]
        for flow, passage in zip(self.flows, self.passages, strict=True):
            self.passage = passage if observed else None
            flow.advance()
        self.passage = None
        if self.scores:
            self.whole = WholeModels(self.decoder, self.outside, self.batches, self.passages, self.device)
            self.whole.start()
        self.outside.forget()

    def _close(self) -> None:
        """End passes that were given up."""
        for flow in self._all_flows():
            flow.close()

    def _all_flows(self) -> list[Flow]:
        return [*self.flows, *([] if self.whole is None else [way.flow for way in self.whole.ways])]

    def _standing(self) -> Standing:
        return Standing(self.parts, self.outside.parts, self.outside.entered, self.missed)

    def _head_inputs(self, finals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the head is given, after what lies between it and the body, which is observed."""
        model, found = self.decoder.model, []
        head = model.get_submodule(self.outside.head_path)
        names = [name for path in self.outside.between for name in tensor_names(model.get_submodule(path), path)]

        def take(states: torch.Tensor) -> torch.Tensor:
            found.append(states)
            return states

        with ExitStack() as stack:
            stack.enter_context(placed(model, "", self.base.weights.fetch(names), self.device))
            to_logits = stack.enter_context(behind_body(self.decoder))
            head.forward = take
            stack.callback(head.__delattr__, "forward")
            for final, passage in zip(finals, self.passages, strict=True):
                self.passage = passage
                to_logits(final)
            self.passage = None
        return found

    @contextmanager
    def _base_outside_placed(self) -> Iterator[None]:
        model, body = self.decoder.model, self.decoder.body
        held = {id(value) for value in [*body.parameters(), *body.buffers()]}
        in_blocks = block_tensor_names(self.decoder)
        pairs = [*model.named_parameters(), *model.named_buffers()]
        names = [name for name, value in pairs if id(value) in held and name not in in_blocks]
        with placed(model, "", self.base.weights.fetch(names), self.device):
            yield

    @contextmanager
    def _outside_observed(self) -> Iterator[None]:
        def hook(path: str) -> Callable[..., None]:
            def take(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
                layer = self.layer if self.layer < 0 else len(self.decoder.blocks)
                if self.passage is not None:
                    self.outside.observe(path, Call(module, args, kwargs, output), layer, self.passage)

            return take

        def entering(path: str) -> Callable[..., None]:
            return lambda *_: self.outside.entered.add(path)

        paths = (*self.outside.paths, *self.outside.between)
        modules = [(path, self.decoder.model.get_submodule(path)) for path in paths]
        handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in modules]
        for path in self.outside.around:
            handles.append(self.decoder.model.get_submodule(path).register_forward_hook(entering(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _through_block(self, blocks: Sequence[nn.Module], flows: Sequence[Flow]) -> list[PartChanges]:
        block = blocks[0]
        prefix = f"{self.decoder.blocks_path}.{self.layer}."
        watched = watched_parts(blocks, self.layer, prefix, self.outside.sums_shape, scores=self.scores)
        inner = [one for one in watched if one.path]
        itself = [one for one in watched if not one.path]  # the block's own hooks would see it at the entrance only
        handles = [
            block.get_submodule(one.path).register_forward_hook(self._hook(one), with_kwargs=True) for one in inner
        ]
        calls: list[tuple[Call, Passage]] = []
        try:
            for flow, passage in zip(flows, self.passages, strict=True):
                flow.expect(self.layer)
                self.passage, arrival = passage, flow.arrival
                call = Call(block, arrival.args, arrival.kwargs, arrival.forward(*arrival.args, **arrival.kwargs))
                calls.append((call, passage))
                for one in itself:
                    one.take(call, passage)
                for one in watched:
                    if not one.is_small:
                        one.part.require_calls(len(calls), f"{one.part.name} of block {self.layer}")
        finally:
            for handle in handles:
                handle.remove()
        for one in watched:
            if one.is_small and one.part.calls != len(flows):
                one.part.sums = around(one.part, watched).sums.clone()
        parts = [one.part for one in watched]
        if self.scores:
            missed = held_out_misses(parts, blocks, calls, self.tokens, prefix)
            self.missed |= {(self.layer, level, expert): value for (level, expert), value in missed.items()}
        for flow, (call, passage) in zip(flows, calls, strict=True):
            self.passage = passage
            flow.advance_with(call.output)
        return parts

    def _hook(self, one: WatchedPart) -> Callable[..., None]:
        return lambda module, args, kwargs, output: one.take(Call(module, args, kwargs, output), self.passage)
