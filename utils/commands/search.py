"""The search's one job: what is measured and allowed -> a study of recipes, raced on validation rows -> the best, on test rows."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.ray_flags import connected
from utils.commands.search_folder import refuse_edited
from utils.commands.search_options import FILES, LOSSES, SearchOptions
from utils.errors import UserError, is_of_the_moment, warn
from utils.evaluation.tasks import Task, task_texts
from utils.guidance.chosen import default_options
from utils.guidance.method import guidance_methods
from utils.models.model_trial import ModelTrial
from utils.models.tokenizer import forget_handed_on
from utils.pair.presence import refuse_missing, small_files
from utils.progress_bar import progress_bar
from utils.publishing.disk import remove_empty
from utils.publishing.files import repair_folder
from utils.publishing.kept import kept_work
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing
from utils.runtime import quiet_libraries, versions_line
from utils.searching.measurements import FOLDER, find_measurements
from utils.searching.points import UNGUIDED
from utils.searching.storage import STORAGE, require_optuna, storage_guarded
from utils.searching.study import stored_beginning
from utils.workers.work_folder import remove_work, work_folder

if TYPE_CHECKING:
    from utils.commands.search_setup import Prepared
    from utils.evaluation.placing import Cluster
    from utils.searching.study import SearchStudy
    from utils.workers.ray_cluster import RayWorkers


_TASKS = ".scoring.part"  # in the output folder


def search_pair(options: SearchOptions) -> None:
    """Check everything that can be known without weights, search, publish the best recipes and what was tried.

    Raises:
        UserError: anything the user can mend. What was scored and tried is kept; typed again, the search goes on.
    """
    start = time.perf_counter()
    say = (lambda line: None) if options.quiet else (lambda line: print(line, flush=True))
    prepare_folder(options.out_dir, "--out_dir")
    mended = repair_folder(options.out_dir)
    warn([mended] if mended else [])
    require_optuna()
    if options.ray is not None:
        options.ray.refuse_devices(options.device, options.devices)
    if not (options.out_dir / STORAGE).exists():
        refuse_existing(options.out_dir, [*FILES, LOSSES])
    refuse_edited(options.out_dir)
    refuse_missing(options.config, [text.source for text in task_texts(options.config).values() if text.source])
    quiet_libraries()
    trial = None if options.trust_remote_code else ModelTrial(small_files(options.config))

    # torch, pandas and what is built on them, once nothing simpler can be wrong
    from utils.commands.search_results import publish_results
    from utils.commands.search_scoring import prepare_scoring
    from utils.commands.search_setup import prepare_search

    say(versions_line("torch", "transformers", "mergekit", "optuna"))
    with locked_folder(options.out_dir), connected(options.ray, say) as workers:
        if trial is not None:
            trial.check()
        with _cluster(options, workers) as cluster, storage_guarded(options.out_dir):
            scoring = prepare_scoring(options, say, cluster)  # what is refused there is refused before it is measured
            missing = _missing_measurements(options, scoring.scorers[0].tasks) if options.measure else []
            warned, left_out = _measure(options, missing)
            ready = prepare_search(options, say, scoring, start=start, warned=warned, left_out=left_out)
            forget_handed_on()
            try:
                stopped = _run(ready)
                publish_results(ready, stopped, say)
            finally:
                ready.study.close()


@contextlib.contextmanager
def _cluster(options: SearchOptions, workers: "RayWorkers | None") -> "Iterator[Cluster | None]":
    """The cluster that scores, if one does, with a folder for the results of its tasks until they are stored."""
    if workers is None:
        yield None
        return
    from utils.evaluation.placing import Cluster

    with work_folder(options.out_dir / _TASKS, {}, keep=False) as folder:
        yield Cluster(workers, folder)


def _missing_measurements(options: SearchOptions, tasks: Sequence[Task]) -> list[str]:
    """The guidances that are asked for (all that can be, without `search.guidance`) and have not measured the pair; but for
    those that the folder's study began without because they could not.

    Raises:
        UserError: the study began without one for another reason, so that it could not use it.
    """
    config = options.config
    there, _ = find_measurements(
        config, config.search.measurements, options.out_dir, trust_remote_code=options.trust_remote_code, tasks=tasks
    )
    asked, experts = config.search.guidance, len(config.experts_to_merge)
    missing = [
        name
        for name, method in guidance_methods().items()
        if name not in there
        and name not in UNGUIDED
        and (name in asked if asked else method.searched and experts >= method.fewest_experts)
    ]
    if (began := stored_beginning(options.out_dir)) is None:
        return missing
    if new := [name for name in missing if name not in began.measurements and name not in began.left_out]:
        raise UserError(
            f"--measure would measure {', '.join(new)}, which the search in {options.out_dir} began without: its trials could "
            "not be compared with new ones. Choose another --out_dir, or go on without --measure",
            "search-other-study",
        )
    warn([began.left_out[name] for name in missing if name in began.left_out])
    return [name for name in missing if name not in began.left_out]


def _measure(options: SearchOptions, guidances: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """Measure the pair with some guidances.

    One that nobody asked for by name and that refuses this pair's models or text is left out, which is said.

    Returns:
        The warnings that were given; what was said of each guidance that was left out.
    """
    config, warned, left_out = options.config, set(), {}
    experts = len(config.experts_to_merge)
    for name in guidances:
        method = guidance_methods()[name]
        try:
            measure_pair(
                MeasureOptions(
                    config=config,
                    method=method,
                    method_options=default_options(method, "measure", experts),
                    out_dir=options.out_dir / FOLDER / name,
                    device=options.device,
                    devices=options.devices,
                    micro_batch_tokens=options.micro_batch_tokens,
                    trust_remote_code=options.trust_remote_code,
                    quiet=options.quiet,
                    ray=options.ray,
                ),
                alone=False,
                warned=warned,
            )
        except UserError as error:
            if config.search.guidance or is_of_the_moment(error):
                raise
            if kept := kept_work(error):  # nobody goes on with what is left out
                remove_work(kept.folder.parent)
                remove_empty([options.out_dir / FOLDER / name, options.out_dir / FOLDER])
            left_out[name] = f"guidance {name} is left out: {error} [{error.code}]"
            warn([left_out[name]])
    return warned, left_out


def _run(ready: "Prepared") -> str:
    """Batch after batch until there are as many trials as asked for; returns why it stopped before, or nothing."""
    from utils.commands.search_watch import Enough, Watch

    options, study, search = ready.options, ready.study, ready.search
    done = sum(trial.state.is_finished() for trial in study.trials)
    with progress_bar("searching", options.trials, "trial", quiet=options.quiet, initial=done) as bar:
        watch = Watch(ready, bar.write if not options.quiet else (lambda line: None))
        search.on_round, search.may_score = watch.on_round, watch.may_score
        try:
            while (following := study.next_batch(options.trials, options.batch)) is not None:
                watch.batches_left = max(0, options.trials - len(study.trials)) // options.batch + 1
                search.run_batch(*following)
                bar.update(sum(trial.state.is_finished() for trial in study.trials) - bar.n)
                _refuse_nothing_left(study, following[0])
        except Enough as reason:
            return str(reason)
    return ""


def _refuse_nothing_left(study: "SearchStudy", batch: int) -> None:
    """End a search of which not one recipe of the first batch has a value: something is wrong with all of them."""
    trials = study.batch(batch)
    if batch == 0 and trials and all(trial.state.name == "FAIL" for trial in trials):
        raise UserError(
            f"not one of the {len(trials)} recipes tried first can be scored; the first: "
            f"{trials[0].user_attrs.get('failure', '')}",
            "search-all-failed",
        )
