"""A model with an adapter's changes, whose names are its model class's: which stored tensor each of them means.

An adapter names modules as the class that it was trained on had them. A checkpoint may store the same otherwise: bodies and
towers have moved within transformers' classes, and a model with a vision tower may be given an adapter of its language
tower as a model of its own. What is stored under the adapter's own name is taken without building the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from utils.models.checkpoints import Checkpoint
from utils.models.low_rank import with_adapter

if TYPE_CHECKING:
    from torch import nn

    from utils.models.stored_layout import StoredLayout


def adapted(model: Checkpoint, adapter: Path, name: str) -> Checkpoint:
    """A model with an adapter's changes, made as its tensors are read.

    Args:
        model: the model.
        adapter: the adapter's folder.
        name: what to call both.

    Raises:
        UserError: the adapter is of another kind, or does not fit the model; transformers cannot build the model, where a
            name has to be looked for.
    """
    tensors = with_adapter(model.tensors, adapter, name, _stored_name_in(model))
    return replace(model, name=name, tensors=tensors, adapter=adapter)


def _stored_name_in(checkpoint: Checkpoint) -> Callable[[str], str | None]:
    """A function from a name in the model's class, of today, of earlier or of its language tower, to the stored tensor's."""

    @cache
    def built() -> tuple["StoredLayout", Callable[[str], Iterator[str]]]:
        import torch

        from utils.models.stored_layout import stored_layout
        from utils.models.weight_source import build_skeleton

        model = build_skeleton(checkpoint, torch.float32, trust_remote_code=False)
        return stored_layout(model, checkpoint), _spellings(model, f"model {checkpoint.name}")

    def stored_name(name: str) -> str | None:
        layout, spellings = built()
        return next((layout.direct[one].name for one in spellings(name) if one in layout.direct), None)

    return stored_name


def _spellings(model: "nn.Module", where: str) -> Callable[[str], Iterator[str]]:
    """A function from a name to the parameters of a model that it may mean: by the class of today, by an earlier one, by that
    of its language tower alone."""
    from utils.models.decoder import find_blocks
    from utils.models.stored_layout import parameter_finder

    of_stored, (blocks, _) = parameter_finder(model), find_blocks(model, where)
    tower, head = blocks.rpartition(".")[0], model.get_output_embeddings()
    heads = [path for path, one in model.named_modules() if head is not None and one is head]

    def spellings(name: str) -> Iterator[str]:
        yield name
        yield from filter(None, [of_stored(name)])
        first, _, rest = name.partition(".")
        yield from (f"{path}.{rest}" for path in heads if path.rpartition(".")[2] == first)
        yield f"{tower}.{rest}"

    return spellings
