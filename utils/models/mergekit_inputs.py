"""Checkpoints as mergekit takes them: its reference to a folder, the config with the one class it wants."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from utils.models.checkpoints import Checkpoint
from utils.models.class_config import class_config

if TYPE_CHECKING:
    from utils.mergekit_api import ModelReference


def vocabulary_key(config: Any) -> str:
    """Where a config says how many tokens there are; a model with a vision tower says it of its language tower."""
    nested = config.get_text_config(decoder=True)
    return next((f"{key}.vocab_size" for key, value in vars(config).items() if value is nested), "vocab_size")


def model_reference(checkpoint: Checkpoint) -> "ModelReference":
    """mergekit's reference to a checkpoint's folder; safe for paths that hold '+' or '@'."""
    from utils.mergekit_api import ModelPath, ModelReference

    return ModelReference(model=ModelPath(path=str(checkpoint.folder)))


@contextlib.contextmanager
def quiet_mergekit() -> Iterator[None]:
    """Silence the warnings that mergekit and transformers log while an architecture is resolved."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """A checkpoint's config as transformers reads it, with the one architecture that mergekit takes.

    Raises:
        UserError: transformers cannot read it.
    """
    config = class_config(checkpoint.folder, checkpoint.name, trust_remote_code)
    config.architectures = [checkpoint.architecture]  # mergekit takes exactly one
    return config
