"""The base's own pass through a text, with the same block of every expert beside the base's.

Each block of the base and the experts is fetched once, for all texts together. On the inputs that the base gives to each
of its parts (`utils/guidance/submodule_linearity/parts.py`), each expert's version of the part is evaluated too. Everything is float32: what a
fine-tune changes is so much smaller than the output that bfloat16 would round it away.

Memory: what lies outside the base's blocks, two blocks of the base and of each expert, the hidden states of all texts,
and, for one micro-batch and one part, the outputs of all models. With scores also the hidden states of each expert's own
text six times (`whole_models.py`, `level_fit.py`) and a merged block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from utils.guidance.submodule_linearity.folds import fold_tokens, sample_folds
from utils.guidance.submodule_linearity.level_fit import held_out_misses
from utils.guidance.submodule_linearity.outside_changes import ComparedModel, OutsideChanges
from utils.guidance.submodule_linearity.part_changes import Call, PartChanges, Passage
from utils.guidance.submodule_linearity.watched_parts import WatchedPart, around, watched_parts
from utils.guidance.submodule_linearity.whole_models import WholeModels
from utils.models.decoder import Decoder
from utils.models.weight_source import placed, tensor_names
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import BlocksInTurn, block_tensor_names
from utils.passes.flows import Flow, stops
from utils.passes.language_head import behind_body


@dataclass(frozen=True)
class ComparedText:
    """A text in the base's tokens; `experts` are the places of those whose own text it is."""

    batches: Sequence[MicroBatch]
    experts: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        """Real tokens in each fold."""
        return fold_tokens(self.batches)


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
    missed: dict[tuple[int, str, int], float]

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
) -> Compared:
    """Measure every part of the base on every text; closes the weight sources.

    Args:
        base, experts: models of one structure, their parameters on the meta device before and after.
        texts: the texts.
        device: where to compute.
        scores: whether to take the non-linearity of blocks, attention, MLPs and whole models, each expert's on its own
            text, and to try merges of each block at every level.
        on_block: called with the layer number after each block.

    Raises:
        UserError: models whose parts differ; parts that do not process each token once.
    """
    comparison = _Comparison(base, experts, texts, device, scores)
    with ExitStack() as stack:
        for model in (base, *experts):
            stack.callback(model.weights.close)
            stack.callback(model.stored.close)
        parts = comparison.run(stack, on_block)
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
        self.batches: list[MicroBatch] = []
        self.passages: list[Passage] = []
        for number, text in enumerate(texts):
            for batch, folds in zip(text.batches, sample_folds(text.batches), strict=True):
                longer = _with_an_axis_of_tokens(batch, self.decoder)
                self.batches.append(longer)
                self.passages.append(_passage(longer.to(device), number, folds, text.experts))
        self.outside = OutsideChanges(base, experts, self.batches, len(texts), device)
        self.layer = -1
        self.passage: Passage | None = None  # None: what runs is not to be observed
        self.whole_scores: dict[int, float] = {}
        self.missed: dict[tuple[int, str, int], float] = {}

    def run(self, stack: ExitStack, on_block: Callable[[int], None]) -> list[PartChanges]:
        layers = range(len(self.decoder.blocks))
        stack.enter_context(self._base_outside_placed())
        turns = [
            stack.enter_context(BlocksInTurn(model.decoder, model.weights, layers, self.device))
            for model in (self.base, *self.experts)
        ]
        stack.enter_context(stops(self.decoder.blocks))
        flows = [Flow(self.decoder.body, batch, self.device) for batch in self.batches]
        stack.callback(lambda: [flow.close() for flow in flows])
        whole = None
        if self.scores:
            whole = WholeModels(self.decoder, self.outside, self.batches, self.passages, self.device)
            stack.callback(whole.close)
        parts: list[PartChanges] = []
        with self._outside_observed():
            for flow, passage in zip(flows, self.passages, strict=True):
                self.passage = passage
                flow.advance()
            self.passage = None
            if whole is not None:
                whole.start()
            self.outside.forget()
            for layer in layers:
                self.layer = layer
                with ExitStack() as placing:
                    blocks = [placing.enter_context(turn.next_block()) for turn in turns]
                    parts += self._through_block(blocks, flows)
                    self.passage = None
                    if whole is not None:
                        whole.through_block(layer, blocks)
                on_block(layer)
            finals = [flow.result() for flow in flows]
            inputs = self._head_inputs(finals) if self.outside.between else finals
            self.outside.forget()
        if whole is not None:
            self.whole_scores = whole.scores(finals)
        around = self.outside.checked(len(flows))
        before = [part for part in around if part.layer < 0]
        behind = [part for part in around if part.layer >= 0]
        return [*before, *parts, *behind, self.outside.head(inputs, self.passages)]

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


def _passage(batch: MicroBatch, text: int, folds: Sequence[int], scored: tuple[int, ...]) -> Passage:
    samples, length = batch.input_ids.shape
    own = torch.tensor(folds, device=batch.input_ids.device)
    return Passage(text, samples, length, batch.mask, own, scored)


def _with_an_axis_of_tokens(batch: MicroBatch, decoder: Decoder) -> MicroBatch:
    """The micro-batch, one pad longer where its length equals a number of heads, so that axes can be told apart."""
    if batch.mask is None:
        return batch
    config = decoder.model.config.get_text_config(decoder=True)
    heads = {getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    while batch.input_ids.shape[1] in heads:
        ids = torch.cat([batch.input_ids, batch.input_ids[:, -1:]], dim=1)
        batch = MicroBatch(ids, batch.lengths, nn.functional.pad(batch.mask, (0, 1)))
    return batch
