"""LoRA adapters of a tiny model with weights that are not zero, and what peft itself makes of model and adapter."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch


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


def measured_and_merged(
    folder: Path, config: str, guidance: str, flags: Sequence[str]
) -> "tuple[dict[str, pd.DataFrame], dict[str, torch.Tensor]]":
    """The tables of command 1 by file name, and the tensors of what commands 2 and 3 make of them.

    Args:
        folder: where `config`, a pair config, lies, and the results go.
        config: its file name.
        guidance: the method.
        flags: further ones of command 1.
    """
    import pandas as pd
    import yaml

    from tests.commands_here import done_here
    from tests.tiny_merges import tensors

    if guidance == "gram_mean":  # which else solves for what short texts hardly say, where roundings grow
        settings = yaml.safe_load((folder / config).read_text())
        (folder / config).write_text(yaml.safe_dump(settings | {"global_parameters": {"ridge": 0.1}}))
    out = f"{Path(config).stem}_{guidance}"
    done_here("lewis_importance.py", "--config", config, "--out_dir", out, "--guidance", guidance, *flags, cwd=folder)
    tables = {file.name: pd.read_csv(file) for file in sorted((folder / out).glob("*.csv"))}
    decide = ("--delta_dfs_in_dir", out, "--config_file", config, "--out_dir", f"{out}_r", "--guidance", guidance)
    done_here("lewis_merge.py", *decide, "--dtype", "float32", cwd=folder)
    (made,) = (folder / f"{out}_r").glob("*.yaml")
    done_here("utils/merger.py", "--merge_config", made, "--output_path", f"{out}_m", "--device", "cpu", cwd=folder)
    return tables, tensors(folder / f"{out}_m")
