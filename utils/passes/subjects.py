"""The models of a pair as they are measured: blocks, stored layout, texts in their tokens. No weights are in memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint
from utils.pair.config import ModelEntry
from utils.pair.source import CalibrationSource

if TYPE_CHECKING:
    import torch

    from utils.models.decoder import Component, Decoder
    from utils.models.stored_layout import StoredLayout
    from utils.pair.batches import MicroBatch


@dataclass(frozen=True)
class EncodedText:
    """A text in one model's tokens: token ids per sample, and the micro-batches made of them."""

    encoded: list[list[int]]
    batches: "list[MicroBatch]"

    @property
    def tokens(self) -> int:
        """Tokens that are computed and counted."""
        return sum(batch.tokens for batch in self.batches)


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor that is a component or a piece of one: what it is called in tables, and in the checkpoint."""

    name: str
    tensor: str


@dataclass(frozen=True)
class Subject:
    """One model, ready to be measured: nothing of its weights is in memory yet.

    `layout` says which stored tensors the model's are made of. `texts` holds every text of the pair config in the model's
    tokens. Pickled, it takes no modules along: skeleton and layout are made again from the checkpoint's folder, which has
    to be there. `experts_apart` says whether the experts of its blocks are fetched one at a time, since no block fits into
    memory (`utils/passes/experts_in_parts.py`); None: not decided, which whoever opens the weights then does.
    """

    entry: ModelEntry
    checkpoint: Checkpoint
    decoder: "Decoder"
    layout: "StoredLayout"
    dtype: "torch.dtype"
    texts: Mapping[CalibrationSource, EncodedText]
    trust_remote_code: bool = False
    experts_apart: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("decoder", "layout")}
        return _with_new_skeleton, (plain, self.decoder.without_model())

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return f"model {self.entry.name}"

    def stored_name(self, parameter: str) -> str:
        """The name in the checkpoint of a parameter that is stored as one tensor."""
        (name,) = self.layout.stored_names(parameter)
        return name

    def parts(self, layer: int, component: "Component") -> list[StoredPart]:
        """What a component of a block is stored as: one tensor, or one for each expert and matrix."""
        names = self.layout.stored_names(self.decoder.weight_name(layer, component))
        if len(names) == 1:
            return [StoredPart(component.name, names[0])]
        return [StoredPart(_IN_BLOCK.sub("", name).removesuffix(".weight"), name) for name in names]


_IN_BLOCK = re.compile(r"^.*?\.\d+\.")  # what stands before a name inside a block


def _with_new_skeleton(plain: Mapping[str, Any], found: Mapping[str, Any]) -> Subject:
    from utils.models.decoder import Decoder
    from utils.models.stored_layout import stored_layout
    from utils.models.weight_source import build_skeleton

    model = build_skeleton(plain["checkpoint"], plain["dtype"], plain["trust_remote_code"])
    layout = stored_layout(model, plain["checkpoint"])
    return Subject(decoder=Decoder.on_model(model, found), layout=layout, **plain)


def component_names(subject: Subject) -> dict[str, str]:
    """What each stored tensor that is a component, or a piece of one, is called in tables."""
    decoder = subject.decoder
    return {
        part.tensor: part.name
        for layer in range(len(decoder.blocks))
        for component in decoder.components_of(layer)
        for part in subject.parts(layer, component)
    }


def require_own_tensors(subject: Subject) -> None:
    """Refuse a model with a component whose stored tensors hold other parts, too, so that they cannot be told apart.

    Raises:
        UserError: there is one (the experts for images of a mixture, stored in one list with those for text).
    """
    decoder = subject.decoder
    for layer in range(len(decoder.blocks)):
        for component in decoder.components_of(layer):
            if not subject.layout.can_split(decoder.weight_name(layer, component)):
                raise UserError(
                    f"model {subject.entry.name}: {component.own_path} of block {layer} is stored in one with other parts, of "
                    "which it cannot be told apart; leave it out of components, or use another --guidance, such as gram_mean",
                    "model-unsupported",
                )


def stored_as(subjects: "Sequence[Subject]", parameter: str) -> "tuple[StoredLayout, str]":
    """The first layout that has a parameter or the one it is tied to, and which of them.

    Raises:
        ValueError: none of the models' checkpoints has it.
    """
    from utils.models.weight_source import tied_names

    tied = tied_names(subjects[0].decoder.model)
    others = [tied.get(parameter), *(name for name, other in tied.items() if other == parameter)]
    for name in (parameter, *others):
        for subject in subjects:
            if name is not None and name in subject.layout:
                return subject.layout, name
    raise ValueError(f"no checkpoint has {parameter}")


def first_stored_name(subjects: "Sequence[Subject]", parameter: str) -> str:
    """A parameter's name in the first checkpoint that has it: its own, else that of the one it is tied to.

    Raises:
        ValueError: none of the models' checkpoints has it, or it is stored in pieces.
    """
    layout, name = stored_as(subjects, parameter)
    (stored,) = layout.stored_names(name)
    return stored


def memory_estimate(subject: Subject) -> int:
    """Bytes: what lies outside the blocks, two blocks, all hidden states, one micro-batch's widest activations."""
    decoder, size = subject.decoder, subject.dtype.itemsize
    blocks = sum(value.numel() for value in decoder.blocks.parameters())
    body = sum(value.numel() for value in decoder.body.parameters()) - blocks
    return size * (body + 2 * largest_block(subject)) + activation_estimate(subject)


def largest_block(subject: Subject) -> int:
    """Entries that are there of the largest block at a time; where experts come one at a time two of their matrices, all else."""
    from utils.passes.experts_in_parts import stack_names

    decoder, found = subject.decoder, []
    for layer, block in enumerate(decoder.blocks):
        stacks = stack_names(decoder, layer, subject.layout) if subject.experts_apart else ()
        own = {f"{decoder.blocks_path}.{layer}.{name}": value for name, value in block.named_parameters()}
        matrix = max((own[name][0].numel() for name in stacks), default=0)
        found.append(2 * matrix + sum(value.numel() for name, value in own.items() if name not in stacks))
    return max(found)


def activation_estimate(subject: Subject) -> int:
    """Bytes of all hidden states and one micro-batch's widest activations."""
    model, decoder, size = subject.decoder.model, subject.decoder, subject.dtype.itemsize
    hidden = model.config.get_text_config(decoder=True).hidden_size
    widest = max(max(value.shape[-2:]) for value in decoder.blocks.parameters() if value.ndim > 1)
    slots = [[batch.input_ids.numel() for batch in text.batches] for text in subject.texts.values()]
    activations = max(map(max, slots)) * (widest * (3 * size + 4) + 4 * hidden * size)
    return size * max(map(sum, slots)) * hidden + activations


def snapshot_bytes(subject: Subject) -> int:
    """Bytes on the disk of where the longest text stands in a model: its hidden states, and those before while they are written."""
    hidden = subject.decoder.model.config.get_text_config(decoder=True).hidden_size
    slots = max(sum(batch.input_ids.numel() for batch in text.batches) for text in subject.texts.values())
    return 2 * slots * hidden * subject.dtype.itemsize
