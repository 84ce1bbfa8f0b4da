"""What can be known of a search before anything is measured: who scores on which rows, towards what, with which disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from utils.commands.scorers import make_scorers, scoring_devices
from utils.commands.search_options import SearchOptions
from utils.errors import UserError, warn
from utils.evaluation.controls import uniform_controls
from utils.evaluation.entries import sweep_written
from utils.evaluation.placing import Cluster
from utils.evaluation.scoring import Scorer
from utils.runtime import gigabytes
from utils.searching.objective import Objective


@dataclass(frozen=True)
class Scoring:
    """Who scores, one for each device, or a cluster in their place, and what is searched for.

    `written` are the bytes of the models that lie in the output folder while they are scored, where recipes have to be
    merged first, `writing_at_once` of them at a time.
    """

    scorers: Sequence[Scorer]
    objective: Objective
    cluster: Cluster | None
    written: int
    writing_at_once: int


def prepare_scoring(options: SearchOptions, say: Callable[[str], None], cluster: Cluster | None = None) -> Scoring:
    """Choose the rows, open the models, and refuse what no measurement would mend.

    Args:
        options: what was asked.
        say: prints, unless asked to be quiet.
        cluster: who scores in the place of this process, if one does.

    Raises:
        UserError: no rows are left beside those of calibration, a task or a model cannot be used, the disk has no room
            for a model that has to be written, or the objective is of tasks that are not there.
    """
    workers = None if cluster is None else cluster.workers
    devices = scoring_devices(options, say) if workers is None else [workers.device]
    scorers = make_scorers(options, devices, workers=workers)
    scorer = scorers[0]
    if workers is not None:
        files = {one.folder: one.files for one in scorer.inputs.values()}
        workers.refuse_unlike(cluster.folder, files)
    objective = _objective(options, scorer)
    sweep_written(options.out_dir)
    config, at_once = options.config, 1 if workers is None else workers.at_once
    uniform = next(iter(uniform_controls(config, scorer.inputs[config.base.type].float_dtype).values()))[0]
    written = scorer.refuse_little_disk([uniform], at_once)
    if options.max_disk is not None and written > options.max_disk:
        raise UserError(
            f"--max_disk {gigabytes(options.max_disk)} is less than one model: recipes of this pair have to be merged into "
            f"{options.out_dir} before they are scored, {gigabytes(written)} at a time; give more",
            "search-max-disk",
        )
    return Scoring(scorers, objective, cluster, written, at_once)


def _objective(options: SearchOptions, scorer: Scorer) -> Objective:
    tasks = [task.name for task in scorer.tasks if task.measures_gain]
    weights = options.config.search.objective_weights
    unknown = [name for name in weights if name not in tasks]
    if unknown:
        raise UserError(
            f"search.objective_weights names {unknown[0]!r}, which is no task with a gain; there are {', '.join(tasks)}",
            "search-unknown-task",
        )
    if options.objective == "weighted" and not weights:
        raise UserError(
            "--objective weighted needs the weights: give search.objective_weights, such as "
            f"{{{tasks[0]}: 2}}, in the pair config",
            "search-no-weights",
        )
    if options.pareto and len(tasks) < 2:
        raise UserError(
            f"--pareto needs two tasks at least, there is {', '.join(tasks)}; give evaluation: in the pair config",
            "search-one-task",
        )
    if weights and options.objective != "weighted":
        warn(["search.objective_weights counts with --objective weighted alone"])
    return Objective.of(options.objective, tasks, weights)
