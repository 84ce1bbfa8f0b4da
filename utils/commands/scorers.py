"""Who scores candidates for a command: one scorer for each device, or one that speaks for a cluster."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.evaluation.tasks import evaluation_rows
from utils.merging.settings import MergeSettings
from utils.pair.config import PairConfig
from utils.runtime import choose_devices

if TYPE_CHECKING:
    import torch

    from utils.evaluation.scoring import Scorer
    from utils.workers.ray_cluster import RayWorkers


@dataclass(frozen=True)
class ScoringOptions:
    """What the evaluator and the search are both asked: of which pair, into which folder, on how many rows, how computed."""

    config: PairConfig
    out_dir: Path
    validation_rows: int = 64
    test_rows: int = 128
    device: str = "auto"
    devices: str | None = None
    dtype: str = "auto"
    micro_batch_tokens: int | None = None
    samples: bool = True
    trust_remote_code: bool = False
    quiet: bool = False


def scoring_devices(options: ScoringOptions, say: Callable[[str], None]) -> "list[torch.device]":
    """The devices asked for; `say` takes the line about them.

    Raises:
        UserError: a device that is not there, or devices of different kinds.
    """
    devices, line = choose_devices(options.device, options.devices)
    say(line + (f"; candidates side by side on {len(devices)} of them" if len(devices) > 1 else ""))
    return devices


def make_scorers(
    options: ScoringOptions,
    devices: "list[torch.device]",
    *,
    random_seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    workers: "RayWorkers | None" = None,
) -> "list[Scorer]":
    """A scorer for each device; the rows are the same.

    Args:
        options: the command's.
        devices: where to compute; of a cluster the one kind that its tasks compute on.
        random_seed: of methods that draw.
        say: takes sentences about what is done.
        workers: the cluster that scores in the place of this process, if one does.

    Raises:
        UserError: a text or a model of the pair that cannot be used.
    """
    from utils.evaluation.score_settings import ScoreSettings
    from utils.evaluation.scoring import Scorer

    tasks = evaluation_rows(options.config, validation=options.validation_rows, test=options.test_rows)
    found = []
    for device in devices:
        merge = MergeSettings(
            Path("unwritten"),
            Path("recipe"),
            device=str(device) if workers is None else "cpu",  # what is planned here may need a GPU that is elsewhere
            random_seed=random_seed,
            trust_remote_code=options.trust_remote_code,
            quiet=True,
        )
        settings = ScoreSettings(
            device,
            options.dtype,
            options.micro_batch_tokens,
            merge=merge,
            scratch=options.out_dir,
            **({} if workers is None else {"threads": workers.cpus}),
        )
        found.append(Scorer(options.config, tasks, settings, say=say))
    return found


def loss_scorers(scorers: "list[Scorer]") -> "list[Scorer]":
    """Those of some scorers that compute losses: one for each GPU, since threads, other than processes, gain nothing by
    sharing one."""
    found = {}
    for place, one in enumerate(scorers):
        device = one.settings.device
        found.setdefault((device.index or 0) if device.type == "cuda" else f"place {place}", one)
    return list(found.values())
