"""Gradients of a whole model by plain autograd, all held: what passes over one block at a time are compared with."""

from pathlib import Path

import torch
from torch import nn

from tests.tiny_checkpoints import VOCABULARY
from utils.models.decoder import Decoder, find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, WeightSource, build_skeleton

CPU = torch.device("cpu")
LENGTHS = (17, 2, 23)  # longer than the sliding windows (8) of Gemma 2 and 3, and the shortest there is


def token_lists(lengths=LENGTHS, seed: int = 1) -> list[list[int]]:
    """Random samples of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def opened(folder: Path, dtype=torch.float32, weights_class=StreamedWeights) -> tuple[Decoder, WeightSource]:
    """A model's skeleton and its weights."""
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, dtype, trust_remote_code=False)
    decoder = find_decoder(model, [], {}, "test model")
    return decoder, weights_class(stored_layout(model, checkpoint), CPU, dtype)


def plain_gradients(
    folder: Path, samples: list[list[int]], dtype=torch.float32
) -> tuple[nn.Module, list[float], dict[tuple[str, int], torch.Tensor]]:
    """The whole model, loaded by transformers; each sample's mean loss; gradients by name and sample."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    losses, gradients = [], {}
    for sample, ids in enumerate(samples):
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        loss = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].mean()
        loss.backward()
        losses.append(loss.item())
        gradients |= {(name, sample): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model, losses, gradients


def plain_squares(folder: Path, samples: list[list[int]]) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """A model's parameters, and the sum over samples of their squared gradients, by name."""
    model, _, gradients = plain_gradients(folder, samples)
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for (name, _), gradient in gradients.items():
        squares[name] += gradient**2
    return parameters, squares
