"""The loss of every sample of a text, by a way forward alone with one decoder block in fast memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from utils.models.decoder import Decoder
from utils.models.weight_source import WeightSource
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import Bystander, Visitor, run_blocks
from utils.passes.language_head import fetch_head, head_names, language_head

LOGITS_AT_ONCE = 2**23


def head_bytes(decoder: Decoder, size: int) -> int:
    """What a way forward needs on its device behind the blocks, beside the hidden states: the head in numbers of `size` bytes,
    and a piece of the logits."""
    tensors = dict(decoder.model.named_parameters(remove_duplicate=False))
    head = {id(tensors[name]): tensors[name].numel() for name in head_names(decoder) if name in tensors}
    return size * sum(head.values()) + LOGITS_AT_ONCE * (size + 2 * torch.float32.itemsize)


@torch.inference_mode()
def sample_losses(
    decoder: Decoder,
    open_weights: Callable[[], WeightSource],
    samples: Sequence[Sequence[int]],
    device: torch.device,
    on_block: Callable[[int], None] = lambda layer: None,
    visitor: Visitor | None = None,
) -> tuple[float, ...]:
    """The mean loss of each sample: nats per predicted token, float32 from the logits on; 0 of one without a next token.

    Memory: that of `run_blocks`, then the head and a piece of the logits.

    Args:
        decoder: the model.
        open_weights: opens where its parameters come from, twice: for the blocks, for the head.
        samples: token ids of each.
        device: where to compute.
        on_block: called once per block.
        visitor: what observes the blocks on the way.
    """
    batches = [MicroBatch.of([ids]) for ids in samples]  # one each: no pads, and the samples' order
    finals = run_blocks(decoder, open_weights(), batches, visitor or Bystander(), device, on_block=on_block)
    return losses_behind(decoder, open_weights(), batches, finals, device)


@torch.inference_mode()
def losses_behind(
    decoder: Decoder,
    weights: WeightSource,
    batches: Sequence[MicroBatch],
    finals: Sequence[Tensor],
    device: torch.device,
) -> tuple[float, ...]:
    """The same from final hidden states [samples, length, hidden] of micro-batches, on the device; in the order of the batches
    and of their samples. Closes the weight source."""
    at_once = max(1, LOGITS_AT_ONCE // decoder.model.get_input_embeddings().weight.shape[0])
    found = []
    with language_head(decoder, fetch_head(decoder, weights), device) as to_logits:
        for batch, final in zip(batches, finals, strict=True):
            for ids, length, states in zip(batch.input_ids.to(device), batch.lengths, final, strict=True):
                total = torch.zeros((), dtype=torch.float64, device=device)
                pairs = zip(states[: length - 1].split(at_once), ids[1:length].split(at_once), strict=True)
                for some, targets in pairs:
                    total += cross_entropy(to_logits(some).float(), targets, reduction="sum")
                found.append(float(total) / max(1, length - 1))
    return tuple(found)
