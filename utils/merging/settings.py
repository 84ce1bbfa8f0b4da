"""What a merge is asked to do beside its recipe: the flags of command 3 as one frozen value."""

import argparse
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbgt]?)b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_PLACES = ("output_path", "merge_config", "transformers_cache", "lora_merge_cache", "evaluation", "restart")
_OF_THIS_RUN = ("quiet", "verbosity", "overwrite", "dry_run", "num_threads", "write_threads")


@dataclass(frozen=True)
class MergeSettings:
    """The flags of command 3; those that `mergekit-yaml` has too have its names and meanings.

    `device` is what was asked for (`auto`, `cpu`, `cuda`, `cuda:1`); `out_shard_size` is in bytes, 0 for one file.
    """

    output_path: Path
    merge_config: Path
    copy_tokenizer: bool = True
    lazy_unpickle: bool = False
    low_cpu_memory: bool = False
    trust_remote_code: bool = False
    allow_crimes: bool = False
    device: str = "auto"
    read_to_gpu: bool = False
    multi_gpu: bool = False
    out_shard_size: int = 5 * 10**9
    clone_tensors: bool = False
    random_seed: int = 0
    async_write: bool = False
    write_threads: int = 1
    num_threads: int | None = None
    write_model_card: bool = True
    fused_experts: bool = False
    lora_merge_cache: Path | None = None
    lora_merge_dtype: str | None = None
    transformers_cache: Path | None = None
    unsafe_truncate_embeddings: bool = False
    quiet: bool = False
    verbosity: int = 0
    overwrite: bool = False
    dry_run: bool = False
    hash_inputs: bool = False
    fast_selection: bool = True
    evaluation: Path | None = None
    report: bool = False
    restart: bool = False
    adapter: bool = False

    def options(self) -> dict[str, Any]:
        """The settings for a manifest; folders of this machine are left out."""
        return {name: value for name, value in asdict(self).items() if name not in _PLACES}

    def asked(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return {name: value for name, value in self.options().items() if name not in _OF_THIS_RUN}


def read_settings(flags: argparse.Namespace) -> MergeSettings:
    """Turn parsed flags into settings: `cuda` and `gpu_rich` are spelled out, combinations are checked.

    Raises:
        UserError: flags that contradict each other or cannot be honored.
    """
    given = dict(vars(flags))
    given.pop("verify", None)  # another job, done instead of a merge
    cuda, gpu_rich = given.pop("cuda"), given.pop("gpu_rich")
    if not given.pop("safe_serialization"):
        raise UserError(
            "--safe_serialization False would write pickles, which can run code when loaded; remove it", "flag-pickles"
        )
    if gpu_rich:
        given |= {"low_cpu_memory": True, "read_to_gpu": True, "multi_gpu": True}
    if given["device"] is None:
        given["device"] = "cuda" if cuda or gpu_rich else "auto"
    elif given["device"] == "cpu" and (cuda or gpu_rich or given["multi_gpu"]):
        flag = "cuda" if cuda else "gpu_rich" if gpu_rich else "multi_gpu"
        raise UserError(f"--device cpu contradicts --{flag}; give one of them", "flag-device-contradiction")
    if given["multi_gpu"]:
        if ":" in given["device"]:
            raise UserError(
                f"--multi_gpu uses every GPU, --device {given['device']} one of them; give one of the two",
                "flag-device-contradiction",
            )
        given["device"] = "cuda"
    return MergeSettings(**given)


def byte_count(text: str) -> int:
    """Read a size: plain bytes, or with a decimal unit K, M, B (as mergekit) or G, T, and an optional final B.

    Raises:
        argparse.ArgumentTypeError: it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or 500M, 5B, 5G")
    return int(float(match[1]) * _UNITS[match[2].lower()])
