"""The search's one job: what is measured and allowed -> a study of recipes, raced on validation rows -> the best, on test rows."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.ray_flags import connected
from utils.commands.search_results import FILES, publish_results
from utils.commands.search_setup import LOSSES, Prepared, SearchOptions, prepare_search
from utils.errors import UserError, warn
from utils.evaluation.tasks import task_texts
from utils.pair.presence import refuse_missing
from utils.progress_bar import progress_bar
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing
from utils.runtime import available_host_bytes, gigabytes, quiet_libraries, versions_line
from utils.workers.work_folder import work_folder

if TYPE_CHECKING:
    from utils.evaluation.placing import Cluster
    from utils.searching.forecast import Pace
    from utils.searching.rounds import Round
    from utils.searching.study import SearchStudy
    from utils.workers.ray_cluster import RayWorkers


_TASKS = ".scoring.part"  # in the output folder


class Enough(Exception):
    """The time or disk that was allowed is used up: what runs is left for the next time, the search ends."""


def search_pair(options: SearchOptions) -> None:
    """Check everything that can be known without weights, search, publish the best recipes and what was tried.

    Raises:
        UserError: anything the user can mend. What was scored and tried is kept; typed again, the search goes on.
    """
    from utils.searching.storage import STORAGE, require_optuna, storage_guarded

    say = (lambda line: None) if options.quiet else (lambda line: print(line, flush=True))
    prepare_folder(options.out_dir, "--out_dir")
    require_optuna()
    if options.ray is not None:
        options.ray.refuse_devices(options.device, options.devices)
    if not (options.out_dir / STORAGE).exists():
        refuse_existing(options.out_dir, [*FILES, LOSSES])
    refuse_missing(options.config, [text.source for text in task_texts(options.config).values() if text.source])
    quiet_libraries()
    say(versions_line("torch", "transformers", "mergekit", "optuna"))
    with locked_folder(options.out_dir), connected(options.ray, say) as workers:
        if options.measure:
            _measure_missing(options)
        with _cluster(options, workers) as cluster, storage_guarded(options.out_dir):
            ready = prepare_search(options, say, cluster=cluster)
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


def _measure_missing(options: SearchOptions) -> None:
    """Measure the pair with every guidance that is asked for (all that can be, without `search.guidance`) and missing.

    A guidance that nobody asked for by name and that refuses this pair's models or text is left out, which is said.
    """
    from utils.guidance.measured_pair import experts_to_merge
    from utils.guidance.method import guidance_methods
    from utils.searching.measurements import FOLDER, find_measurements
    from utils.searching.points import UNGUIDED

    config = options.config
    there, _ = find_measurements(
        config, config.search.measurements, options.out_dir, trust_remote_code=options.trust_remote_code
    )
    asked, experts = config.search.guidance, len(experts_to_merge(config))
    for name, method in guidance_methods().items():
        wanted = name in asked if asked else method.searched and experts >= method.fewest_experts
        if name in there or name in UNGUIDED or not wanted:
            continue
        try:
            measure_pair(
                MeasureOptions(
                    config=config,
                    method=method,
                    method_options={flag.name: flag.default for flag in method.measure_flags},
                    out_dir=options.out_dir / FOLDER / name,
                    device=options.device,
                    devices=options.devices,
                    micro_batch_tokens=options.micro_batch_tokens,
                    trust_remote_code=options.trust_remote_code,
                    quiet=options.quiet,
                    ray=options.ray,
                ),
                alone=False,
            )
        except UserError as error:
            if asked:
                raise
            warn([f"guidance {name} is left out: {error} [{error.code}]"])


def _run(ready: Prepared) -> str:
    """Batch after batch until there are as many trials as asked for; returns why it stopped before, or nothing."""
    options, study, search = ready.options, ready.study, ready.search
    done = sum(trial.state.is_finished() for trial in study.trials)
    with progress_bar("searching", options.trials, "trial", quiet=options.quiet, initial=done) as bar:
        watch = _Watch(ready, bar.write if not options.quiet else (lambda line: None))
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


@dataclass
class _Watch:
    """Watches time and disk while a search runs, and tells after its first round what the rest will take."""

    ready: Prepared
    write: Callable[[str], None]
    batches_left: int = 1
    pace: "Pace | None" = None

    def may_score(self, candidates: int, losses: int) -> None:
        """Raise `Enough` if a round would go over the time, or the folder is over the disk, that is allowed."""
        options = self.ready.options
        if options.max_hours is not None and self.pace is not None:
            used = time.perf_counter() - self.ready.start
            needed = self.pace.seconds(candidates, losses) + self._end_seconds()
            if used + needed > 3600 * options.max_hours:
                raise Enough(f"--max_hours {options.max_hours:g}: a round more would take too long")
        if options.max_disk is not None and (size := folder_bytes(options.out_dir)) > options.max_disk:
            raise Enough(f"--max_disk: {options.out_dir} holds {gigabytes(size)}")

    def on_round(self, done: "Round") -> None:
        """Take the pace of what was scored; after the first round, the forecast."""
        from utils.searching.forecast import Pace

        seconds = self.ready.scorer.seconds
        if done.scored:
            first = self.pace is None
            before = getattr(self, "_before", (0.0, 0.0))
            self.pace = Pace.measured(
                seconds.weights - before[0], seconds.forward - before[1], done.candidates, done.scored
            )
            if first:
                self._say()
        self._before = (seconds.weights, seconds.forward)
        self.write(
            f"batch {done.batch}: {done.candidates} candidates read {done.rows} rows; {done.beaten} are beaten or failed"
        )

    def _say(self) -> None:
        from utils.searching.forecast import forecast

        ready, options = self.ready, self.ready.options
        rounds = [sum(seen) for seen in ready.search.schedule()]
        left = sum(not trial.state.is_finished() for trial in ready.study.trials)
        left += max(0, options.trials - len(ready.study.trials))
        coming = forecast(self.pace, left, self.batches_left, rounds, _AT_THE_END, self._test_rows())
        disk = folder_bytes(options.out_dir)
        per_trial = disk / max(1, len(ready.study.trials))
        self.write(
            f"forecast: {coming.shown} for the {left} trials that are left and the end; "
            f"{gigabytes(disk + per_trial * left)} of disk; memory so far {gigabytes(peak_bytes())}, "
            f"{gigabytes(available_host_bytes())} are free"
        )

    def _test_rows(self) -> int:
        return sum(len(task.part("test")) for task in self.ready.scorer.tasks)

    def _end_seconds(self) -> float:
        return self.pace.seconds(_AT_THE_END, _AT_THE_END * self._test_rows()) if self.pace else 0.0


_AT_THE_END = 8  # about so many candidates are scored on test rows: the pair, the best, uniform ones


def folder_bytes(folder: Path) -> int:
    """How much a folder holds."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
