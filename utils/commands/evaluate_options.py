"""What the evaluator was asked to do."""

from dataclasses import dataclass
from pathlib import Path

from utils.pair.config import PairConfig


@dataclass(frozen=True)
class EvaluateOptions:
    """What the evaluator was asked to do; `candidates` are as typed."""

    config: PairConfig
    out_dir: Path
    candidates: tuple[str, ...] = ()
    against: str | None = None
    controls: bool = True
    samples: bool = True
    test_rows: int = 128
    validation_rows: int = 64
    device: str = "auto"
    devices: str | None = None
    dtype: str = "auto"
    micro_batch_tokens: int | None = None
    random_seed: int = 0
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    overwrite: bool = False
    quiet: bool = False
