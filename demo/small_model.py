"""A small language model from nothing: tokenizer, training windows, training loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Longer than any row of the example, and than the default `seqlen` of the measurement.
POSITIONS = 1024


@dataclass(frozen=True)
class Shape:
    """The size of a Llama: as many key-value heads as heads."""

    vocabulary: int = 2048
    hidden: int = 160
    intermediate: int = 384
    blocks: int = 6
    heads: int = 5


def new_model(
    shape: Shape, tokenizer: "PreTrainedTokenizerFast", seed: int, *, tied: bool = True
) -> "LlamaForCausalLM":
    """An untrained Llama in float32, its weights drawn from `seed`; its vocabulary is the tokenizer's.

    `tied`: the head is the embedding.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_tokenizer(rows: Sequence[str], vocabulary: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with exactly `vocabulary` tokens or fewer; digits are tokens of their own; `<s>` starts a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=POSITIONS
    )


def windows(rows: Sequence[str], tokenizer: "PreTrainedTokenizerFast", window: int) -> "torch.Tensor":
    """All rows as one stream of tokens, `</s>` between them, cut into windows: int64, (windows, window)."""
    import torch

    stream = [token for ids in tokenizer(list(rows))["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    whole = len(stream) // window
    return torch.tensor(stream[: whole * window]).view(whole, window)


def fit(
    model: "LlamaForCausalLM",
    data: "torch.Tensor",
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    name: str,
) -> None:
    """Train all weights of `model` in place, in float32, for exactly `steps` steps of AdamW.

    The learning rate rises over the first tenth of the steps and falls linearly to zero; windows are drawn without
    replacement, epoch by epoch, from a generator of its own. `name` goes before each line of progress.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        rows, order = data[order[:batch]], order[batch:]
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step + 1} of {steps}, training loss {loss.item():.3f}", flush=True)
    model.eval()
