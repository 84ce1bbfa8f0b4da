"""LoRA adapters of a tiny model with weights that are not zero, and what peft itself makes of model and adapter."""

import json
import shutil
from pathlib import Path
from typing import Any


def in_float32(folder: Path) -> Path:
    """Store a model of one file in float32, with the same numbers."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: value.float() for name, value in load_file(file).items()}, file, {"format": "pt"})
    return folder


def save_adapter(model: Path, folder: Path, seed: int = 9, **settings: Any) -> Path:
    """Save a random adapter on a model into `folder`; `settings` are those of peft's `LoraConfig`."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    asked = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    adapted = get_peft_model(_loaded(model, torch.float32), LoraConfig(**asked))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.05)
    adapted.save_pretrained(folder)
    return folder


def save_merged(model: Path, adapter: Path, folder: Path, dtype: str = "float32") -> Path:
    """Save what peft merges of both, computed and stored in a dtype."""
    import torch
    from peft import PeftModel

    loaded = _loaded(model, getattr(torch, dtype))
    PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(folder)
    return folder


def _loaded(folder: Path, dtype: Any) -> Any:
    """A model as the class that its config names."""
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype)


def rename_in_adapter(adapter: Path, folder: Path, before: str, after: str) -> Path:
    """Save a copy of an adapter into `folder` in which names begin as those of another model class."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    start = f"base_model.model.{before}"
    assert any(name.startswith(start) for name in stored)
    renamed = {name.replace(start, f"base_model.model.{after}", 1): value for name, value in stored.items()}
    save_file(renamed, file, {"format": "pt"})
    return folder
