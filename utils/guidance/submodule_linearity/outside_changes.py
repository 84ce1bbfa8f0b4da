"""What experts change about the parts outside the decoder blocks: embeddings, norms, the language-model head.

The head is never evaluated on a vocabulary of logits: being linear, it does to all the final hidden states of a fold
together what it does to the rows of their triangular root (`gram.py`), a piece of the vocabulary at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from utils.errors import UserError
from utils.guidance.submodule_linearity.folds import FOLDS
from utils.guidance.submodule_linearity.gram import TriangularRoot, gram_of_linear_maps
from utils.guidance.submodule_linearity.method import TENSOR
from utils.guidance.submodule_linearity.part_changes import Call, PartChanges, Passage, Variant, observe
from utils.guidance.submodule_linearity.parts import outside_submodules, own_parameters
from utils.models.decoder import Decoder
from utils.models.weight_source import WeightSource, placed, tied_names
from utils.pair.batches import MicroBatch

_HEAD_ENTRIES_AT_ONCE = 2**24  # of each model's head


@dataclass(frozen=True)
class ComparedModel:
    """A model to compare: `weights` gives float32, `stored` what lies outside the blocks, head included, as it comes."""

    decoder: Decoder
    weights: WeightSource
    stored: WeightSource
    where: str


class OutsideChanges:
    """Measures the parts outside the blocks while the base runs.

    Args:
        base: the base, with what lies outside its blocks in memory.
        experts: the experts; their weights are fetched when the base first calls a part, and let go by `forget`.
        batches: all micro-batches, whose tokens say which rows of an embedding matter.
        texts: how many texts there are.
        device: where to compute.
    """

    def __init__(
        self,
        base: ComparedModel,
        experts: Sequence[ComparedModel],
        batches: Sequence[MicroBatch],
        texts: int,
        device: torch.device,
    ) -> None:
        self.base, self.experts, self.device = base, experts, device
        found = outside_submodules(base.decoder)
        self.paths, self.between, self.head_path = found.paths, found.between, found.head
        self.ids = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
        self.sums_shape = (texts, FOLDS, len(experts), len(experts))
        self.around = {path.rpartition(".")[0] for path in self.paths}
        self.entered: set[str] = set()
        self.parts: dict[str, PartChanges] = {}
        self.variants: dict[str, list[Variant]] = {}

    def observe(self, path: str, call: Call, layer: int, passage: Passage) -> None:
        """Add a call that the base made, before its blocks (`layer` -1) or behind them."""
        if _holds_modules(call.module) and not self._in_tower(path):
            return  # what it holds beside modules is for images (a model of towers has marks between their rows)
        part = self.parts.setdefault(path, self._empty_part(path, layer))
        variants = self.variants_of(path)
        with ExitStack() as stack:
            for variant in variants:
                stack.enter_context(placed(variant.module, "", variant.own, self.device))
            observe(part, call, variants, passage, scored=False)

    def variants_of(self, path: str) -> list[Variant]:
        """The experts' versions of a part, their weights fetched now if they are not there."""
        if path not in self.variants:
            self.variants[path] = [self._variant(path, expert) for expert in self.experts]
        return self.variants[path]

    def forget(self) -> None:
        """Let go of the experts' weights."""
        self.variants.clear()

    def checked(self, calls: int) -> list[PartChanges]:
        """The parts, in the model's order, after a check that each that text reaches was called that often."""
        parts = [self.parts.get(path) or self._empty_part(path, -1) for path in (*self.paths, *self.between)]
        for part in parts:
            if part.calls or part.name in self.between or self._is_reached(part.name):
                part.require_calls(calls, part.name)
        return parts

    def _is_reached(self, path: str) -> bool:
        """Whether text may use a part's weights without calling it: its surroundings are called, it stands alone."""
        alone = not _holds_modules(self.base.decoder.model.get_submodule(path))
        return alone and path.rpartition(".")[0] in self.entered and self._in_tower(path)

    def _in_tower(self, path: str) -> bool:
        """Whether a part belongs to the language tower; others, which text does not reach, keep the base's weights."""
        tower = self.base.decoder.blocks_path.rpartition(".")[0]
        return path.startswith(f"{tower}.") or not any(
            other.startswith(f"{tower}.") for other in self.paths if other != path
        )

    def head(self, inputs: Sequence[torch.Tensor], passages: Sequence[Passage]) -> PartChanges:
        """The head's changes, from its inputs [samples, length, hidden] in each micro-batch."""
        if not isinstance(self.base.decoder.model.get_submodule(self.head_path), nn.Linear):
            raise UserError(
                f"{self.head_path} is not a linear map; this architecture is not supported", "model-unsupported"
            )
        heads = [_fetched_head(model, self.head_path) for model in (self.base, *self.experts)]
        biased = heads[0][1] is not None
        part = self._empty_part(self.head_path, len(self.base.decoder.blocks))
        roots: dict[tuple[int, int], TriangularRoot] = {}
        for given, passage in zip(inputs, passages, strict=True):
            rows = passage.rows(given, self.head_path)
            rows = _with_ones(rows, passage) if biased else rows
            for fold, own in zip(passage.folds.tolist(), rows.chunk(passage.samples), strict=True):
                roots.setdefault((passage.text, fold), TriangularRoot()).add(own)
        texts, folds = zip(*roots, strict=True)
        found = gram_of_linear_maps(_head_changes(heads), [root.value() for root in roots.values()])
        part.sums[list(texts), list(folds)] = found
        return part

    def _empty_part(self, path: str, layer: int) -> PartChanges:
        module = self.base.decoder.model.get_submodule(path)
        names = tuple(f"{path}.{name}" for name in own_parameters(module))
        sums = torch.zeros(self.sums_shape, dtype=torch.float64, device=self.device)
        return PartChanges((TENSOR,), layer, path, names, sums)

    def _variant(self, path: str, expert: ComparedModel) -> Variant:
        base, module = (model.decoder.model.get_submodule(path) for model in (self.base, expert))
        own = own_parameters(base)
        if _holds_modules(base) and self.base.decoder.blocks_path.startswith(f"{path}." if path else ""):
            raise UserError(
                f"{path} holds parameters beside the decoder blocks; this architecture is not supported",
                "model-unsupported",
            )
        if module is expert.decoder.model.get_input_embeddings() and isinstance(module, nn.Embedding):
            tensors = {"weight": self._seen_rows(path, expert, base.weight)}
        else:
            fetched = expert.weights.fetch([f"{path}.{name}" for name in own])
            tensors = {name: fetched[f"{path}.{name}"] for name in own}
        around = {name: value for name, value in base.named_parameters() if name not in own}
        return Variant(module, module, own, tensors, around)

    def _seen_rows(self, path: str, expert: ComparedModel, base: torch.Tensor) -> torch.Tensor:
        """An expert's embedding with only the rows filled that the text uses; the base's where it has no such row."""
        stored = expert.stored.fetch([f"{path}.weight"])[f"{path}.weight"]
        there = self.ids[self.ids < stored.shape[0]].to(self.device)
        beyond = self.ids[self.ids >= stored.shape[0]].to(self.device)
        rows = torch.zeros(base.shape, dtype=torch.float32, device=self.device)
        rows[there], rows[beyond] = stored[there].float(), base[beyond]
        return rows


def _holds_modules(module: nn.Module) -> bool:
    """Whether modules with parameters are inside a module that has some of its own."""
    return len(own_parameters(module)) < sum(1 for _ in module.parameters())


Head = tuple[torch.Tensor, torch.Tensor | None]  # weight [vocabulary, hidden], bias [vocabulary]


def _fetched_head(model: ComparedModel, path: str) -> Head:
    tied = tied_names(model.decoder.model)
    found = []
    for name in own_parameters(model.decoder.model.get_submodule(path)):
        full = f"{path}.{name}"
        fetched = model.stored.fetch([full, *([tied[full]] if full in tied else [])])
        if not fetched:
            raise UserError(
                f"{model.where}: its checkpoint holds no {full}; save it with its language-model head", "model-no-head"
            )
        found.append(fetched.get(full, next(iter(fetched.values()))))
    return found[0], found[1] if len(found) > 1 else None


def _head_changes(heads: Sequence[Head]) -> Iterator[list[torch.Tensor]]:
    """W_s - W_0 of each expert, a piece of the common vocabulary at a time; a bias is one more column."""
    rows = min(weight.shape[0] for weight, _ in heads)
    at_once = max(1, _HEAD_ENTRIES_AT_ONCE // heads[0][0].shape[1])
    for start in range(0, rows, at_once):
        piece = slice(start, min(rows, start + at_once))
        base, *others = (
            weight[piece].float() if bias is None else torch.cat([weight[piece], bias[piece, None]], dim=1).float()
            for weight, bias in heads
        )
        yield [other - base for other in others]


def _with_ones(rows: torch.Tensor, passage: Passage) -> torch.Tensor:
    ones = rows.new_ones(rows.shape[0], 1)
    return torch.cat([rows, ones if passage.mask is None else ones * passage.mask.reshape(-1, 1)], dim=1)
