"""Tiny pairs whose models are mixtures of experts, or any other architecture of the sweep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.architectures.shrinking import Row, save_changed, tiny_model
from tests.architectures.sweep import read_rows
from tests.tiny_pairs import save_tokenizer, write_config


def save_mixtures(folder: Path, model_type: str = "qwen3_moe", kind: str = "causal", **settings: Any) -> Path:
    """Make `folder` with `base`, and `code` and `math` that differ from it a little everywhere; text and `pair.yaml`."""
    known = {row.label: row.settings for row in read_rows()}
    model = tiny_model(Row(model_type, kind, {**known[f"{model_type}:{kind}"], **settings}))
    model.save_pretrained(folder / "base")
    for seed, name in enumerate(("code", "math"), 1):
        save_changed(model, folder / name, seed)
    for name in ("base", "code", "math"):
        save_tokenizer(folder / name)
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(folder)
    return folder


def save_stacked(folder: Path, stacked: Path) -> Path:
    """The same models and text with experts stored stacked, as transformers has them in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    for name in ("base", "code", "math"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        model.save_pretrained(stacked / name, save_original_format=False)
        save_tokenizer(stacked / name)
    for name in ("rows.jsonl", "pair.yaml"):
        (stacked / name).write_bytes((folder / name).read_bytes())
    return stacked


def weights(folder: Path) -> Mapping[str, Any]:
    """All tensors of a checkpoint, by stored name."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
