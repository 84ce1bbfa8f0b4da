"""By what a recipe and its manifest know a model: where it is, at which revision, with which adapter."""

from dataclasses import dataclass
from pathlib import Path

from utils.models.low_rank import adapter_name
from utils.pair.config import ModelEntry


@dataclass(frozen=True)
class NamedModel:
    """A folder or hub id as a recipe writes it, the revision if one was asked for, and the adapter's folder or id."""

    path: str
    revision: str | None = None
    adapter: str | None = None

    def __str__(self) -> str:
        """`path@revision+adapter`."""
        own = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{own}+{self.adapter}" if self.adapter else own


def named_model(entry: ModelEntry) -> NamedModel:
    """What the recipe names a model of the pair config by.

    Raises:
        UserError: an adapter's config is malformed.
    """
    parts = adapter_name(entry.name)
    if parts is None:
        return NamedModel(_expanded(entry.name), entry.revision)
    return NamedModel(_expanded(parts.model), entry.revision, _expanded(parts.adapter))


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name
