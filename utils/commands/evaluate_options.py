"""What the evaluator was asked to do."""

from dataclasses import dataclass

from utils.commands.scorers import ScoringOptions


@dataclass(frozen=True)
class EvaluateOptions(ScoringOptions):
    """What the evaluator was asked to do; `candidates` are as typed."""

    candidates: tuple[str, ...] = ()
    against: str | None = None
    controls: bool = True
    random_seed: int = 0
    confirm_run_unsafe_code: bool = False
    overwrite: bool = False
