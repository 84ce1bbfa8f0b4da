"""A candidate's whole model in memory, for what has to generate; a recipe's is merged into memory, nothing is written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.evaluation.candidates import Candidate
from utils.evaluation.entries import Preparing, ReadyCandidate
from utils.evaluation.weights import CandidateWeights
from utils.models.tokenizer import load_tokenizer
from utils.models.weight_source import placed, share_tied


@dataclass(frozen=True)
class WholeModel:
    """A causal language model with all its weights on a device, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


@contextmanager
def whole_model(candidate: Candidate, preparing: Preparing, scratch: Path | None = None) -> Iterator[WholeModel]:
    """A candidate's model for as long as the context lasts; one at a time, its weights go when it ends.

    Raises:
        UserError: anything that scoring it would raise; a merged tensor that is not finite (`merge-not-finite`).
    """
    with ExitStack() as stack:
        if candidate.recipe is None:
            ready = preparing.model(candidate)
        else:
            planned = preparing.plan(candidate)
            ready = preparing.recipe(candidate, planned)
            if isinstance(ready, str):
                ready = stack.enter_context(preparing.written(candidate, planned, scratch))
        tokenizer = load_tokenizer(ready.folder, candidate.name, preparing.settings.trust_remote_code)
        stack.enter_context(_weights_in(ready, preparing.device))
        yield WholeModel(ready.decoder.model, tokenizer)


@contextmanager
def _weights_in(ready: ReadyCandidate, device: torch.device) -> Iterator[None]:
    model = ready.decoder.model
    weights = CandidateWeights([ready.open_weights()], device)
    names = list(dict.fromkeys(name for name, _ in [*model.named_parameters(), *model.named_buffers()]))
    try:
        (tensors,) = weights.fetch([0], [names])
    finally:
        weights.close()
    if isinstance(tensors, Exception):
        raise tensors
    with placed(model, "", tensors, device):
        share_tied(model, tensors)
        yield
