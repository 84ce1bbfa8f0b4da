"""How losses are computed, and what of that decides their bits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.merging.settings import MergeSettings
from utils.runtime import computing_dtype


@dataclass(frozen=True)
class ScoreSettings:
    """How losses are computed.

    `dtype` is `auto` (a recipe's output dtype, a checkpoint's own, or float32 where the device is slow in it) or a torch
    name; merged tensors are rounded to the recipe's output dtype first. `tokens_at_once` is of a batch, None: by device.
    `threads` are torch's. `most_at_once` bounds the candidates of a pass, None: by memory. `merge` are command 3's flags
    (seed, device). `scratch` is where models that have to be written lie meanwhile, None for the system's folder.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "auto"
    tokens_at_once: int | None = None
    most_at_once: int | None = None
    merge: MergeSettings = field(default_factory=lambda: MergeSettings(Path("unwritten"), Path("recipe"), quiet=True))
    scratch: Path | None = None
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch: enough to keep the device busy, few enough to bound activations."""
        return self.tokens_at_once or (16384 if self.device.type == "cuda" else 2048)

    def record(self) -> dict[str, Any]:
        """What of it decides the bits of the losses, as plain data."""
        return {
            "device": self.device.type,
            "dtype": self.dtype,
            "bfloat16_computed_in": computing_dtype("bfloat16", self.device),
            "float16_computed_in": computing_dtype("float16", self.device),
            "batch_tokens": self.batch_tokens,
            "threads": self.threads if self.device.type == "cpu" else None,
            "random_seed": self.merge.random_seed,
        }
