"""Trained models made as large as wanted without training: the same function at the cost of a larger model.

Each feature, hidden unit and attention head occurs `width` times, and what is read from copies is divided by their number;
between trained blocks stand others that add nothing. So losses are those of the small model, up to rounding, and so are
those of its merges: every entry of a change occurs equally often, so shares of largest entries are the same (which of equal
entries a cut takes apart). Function-preserving growth as in Net2Net (arXiv 1511.05641), here of whole pairs.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shapes import write_shards

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"(model\.layers\.)(\d+)(\..*)")
_ADDED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # what a block adds to the hidden states


def widen(source: Path, target: Path, width: int, depth: int) -> Path:
    """Write a Llama model with a tied head anew with `width` times its width and `depth` times its blocks, in bfloat16,
    tokenizer included."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    target.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(source)
    weights = load_file(source / "model.safetensors")
    write_shards(target, ((name, value.bfloat16()) for name, value in widened(weights, width, depth)))
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, key, width * getattr(config, key))
    config.num_hidden_layers *= depth
    config.dtype = "bfloat16"
    config.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def widened(weights: "Mapping[str, torch.Tensor]", width: int, depth: int) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors of the larger model by name; of a block that was put in between, the output projections are 0."""
    for name, value in weights.items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            yield name, _outside(name, value, width)
            continue
        before, layer, after = found.groups()
        larger = value.repeat(width) if value.dim() == 1 else (value / width).repeat(width, width)
        for copy in range(depth):
            is_silent = copy and after.endswith(_ADDED)
            yield f"{before}{depth * int(layer) + copy}{after}", larger.new_zeros(larger.shape) if is_silent else larger


def _outside(name: str, value: "torch.Tensor", width: int) -> "torch.Tensor":
    """Embeddings, which are the head as well, and the last norm: its copies are added up by the head."""
    if value.dim() == 1:
        return value.repeat(width) / width
    if name != "model.embed_tokens.weight":
        raise ValueError(f"{name}: a head of its own is not provided for")
    return value.repeat(1, width)


def shape_of(models: Path, width: int, depth: int) -> str:
    """What the larger models of a folder are called."""
    config = json.loads((models / "base" / "config.json").read_text())
    hidden, blocks = config["hidden_size"], config["num_hidden_layers"]
    return f"{hidden * width}x{blocks * depth} (trained as {hidden}x{blocks})"
