"""What command 1 was asked to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.commands.ray_flags import RayFlags
from utils.guidance.chosen import Chosen
from utils.guidance.method import GuidanceMethod
from utils.pair.config import PairConfig


@dataclass(frozen=True)
class MeasureOptions:
    """What command 1 was asked to do. `method_options` are the values of the guidance method's own flags; `said` and `apart` are
    as in `Chosen`."""

    config: PairConfig
    method: GuidanceMethod
    method_options: Mapping[str, Any]
    out_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    micro_batch_tokens: int | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    devices: str | None = None
    restart: bool = False
    quiet: bool = False
    ray: RayFlags | None = None
    said: str = ""
    apart: Callable[[], Chosen] | None = None
