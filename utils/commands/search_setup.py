"""From who scores on which rows to a search's first trial: measurements, space, study, yardstick."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from utils.commands.next_command import from_here
from utils.commands.search_options import LOSSES, SearchOptions
from utils.commands.search_scoring import Scoring
from utils.errors import UserError, warn
from utils.evaluation.candidates import Candidate, models_of_pair
from utils.evaluation.placing import score_placed
from utils.evaluation.scoring import Scorer
from utils.evaluation.store import LossStore
from utils.evaluation.tasks import VALIDATION
from utils.guidance.measured_pair import MeasuredPair
from utils.models.relative_change import strangers
from utils.publishing.files import repair_folder
from utils.recipes.naming import LocalModels
from utils.runtime import available_bytes, gigabytes
from utils.searching.knowns import Known, knowns, untried
from utils.searching.losses import Entrant, Losses
from utils.searching.measurements import find_measurements, identity
from utils.searching.objective import Objective, gain_scales
from utils.searching.recipes import VECTORS, RecipeMaker
from utils.searching.rounds import Search, Yardstick, known_of_rows
from utils.searching.space import Space
from utils.searching.study import SearchStudy
from utils.searching.ways import ways_to_try


@dataclass
class Prepared:
    """A search that is ready to run: who scores, what is searched, and what gains are measured with.

    `memory` are the bytes that a pass of a batch over all rows takes, about (None: on a cluster). `written` are those of the
    models that lie in the folder while they are scored, where recipes have to be written first, `writing_at_once` of them at
    a time. `start` is when the command began.
    """

    options: SearchOptions
    scorer: Scorer
    store: LossStore
    measured: Mapping[str, MeasuredPair]
    maker: RecipeMaker
    space: Space
    objective: Objective
    yardstick: Yardstick
    losses: Losses
    study: SearchStudy
    search: Search
    warnings: list[str]
    start: float
    memory: int | None
    written: int = 0
    writing_at_once: int = 1


def prepare_search(
    options: SearchOptions,
    say: Callable[[str], None],
    scoring: Scoring,
    first: Sequence[Known] | None = None,
    start: float | None = None,
    warned: Collection[str] = (),
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> Prepared:
    """Everything up to the first trial: measurements, space, study, the pair's own losses on validation rows.

    Args:
        options: what was asked.
        say: prints, unless asked to be quiet.
        scoring: who scores, towards what.
        first: what to try first; None: the usual (`utils/searching/knowns.py`).
        start: when the command began (`time.perf_counter`), which time limits count from; None: now.
        warned: warnings that were given before, which are not given again.
        left_out: why guidances could not be measured, which the study notes.

    Raises:
        UserError: anything the user can mend.
    """
    start = time.perf_counter() if start is None else start
    config, scorer, objective, cluster = options.config, scoring.scorers[0], scoring.objective, scoring.cluster
    measured, notes = find_measurements(
        config,
        config.search.measurements,
        options.out_dir,
        trust_remote_code=options.trust_remote_code,
        tasks=scorer.tasks,
    )
    experts = config.experts_to_merge
    models = LocalModels(config.base, experts, trust_remote_code=options.trust_remote_code)
    dtype = scorer.inputs[config.base.type].float_dtype
    repair_folder(options.out_dir / VECTORS)
    maker = RecipeMaker(config, models, measured, options.out_dir / VECTORS, dtype)
    ways = ways_to_try(config.search, list(measured))
    space = Space(config.search, ways, tuple(one.type for one in experts), len(maker.blocks.filters))
    tried = knowns(space, maker, _knowns_share(options.trials)) if first is None else list(first)
    notes += scorer.warnings
    notes += strangers(scorer.inputs, config.base.type, [one.type for one in experts])
    warn([note for note in notes if note not in warned])
    store = LossStore(options.out_dir / LOSSES)
    store.sweep()
    losses = Losses(lambda candidates, rows: score_placed(scoring.scorers, store, candidates, rows, cluster)[0])
    study = SearchStudy(
        options.out_dir,
        space,
        _identity(options, scorer, space, objective, measured),
        sampler=options.sampler,
        seed=options.seed,
        tasks=[f"gain kept on {task}" for task in objective.tasks] if options.pareto else [options.figure],
        left_out=left_out,
    )
    with ExitStack() as failing:  # what is refused now leaves the storage in its one file
        failing.callback(study.close)
        study.queue(tried)
        yardstick, doubts = _yardstick(options, scorer, objective, losses)
        at_once = max(options.batch, len(tried))
        at_first = Candidate("first", recipe=maker.make(tried[0].point).data)
        memory = scorer.memory(at_first, at_once, yardstick.rows) if cluster is None else None
        search = Search(study, maker, losses, yardstick, options.first_rows, options.margin / 100, check=scorer.check)
        ready = Prepared(
            options, scorer, store, measured, maker, space, objective, yardstick, losses, study, search,
            [*notes, *doubts], start, memory, scoring.written, scoring.writing_at_once,
        )  # fmt: skip
        _say_choices(ready, tried, say)
        warn(doubts)
        failing.pop_all()
        return ready


def _knowns_share(trials: int) -> int:
    """How many of the trials the knowns may be."""
    return max(3, 3 * trials // 4)


def trials_for(knowns: int) -> int:
    """The fewest trials of which the knowns may be so many."""
    return -(-4 * knowns // 3)


def _identity(
    options: SearchOptions,
    scorer: Scorer,
    space: Space,
    objective: Objective,
    measured: Mapping[str, MeasuredPair],
) -> dict[str, Any]:
    """What makes trials comparable, by what to call it in a message."""
    return {
        "pair": {name: scorer.model_mark(one) for name, one in scorer.inputs.items()},
        "global_parameters": dict(options.config.global_parameters),
        "rows": {task.name: [task.digest, len(task.part("validation"))] for task in scorer.tasks},
        "rows of the first round": options.first_rows,
        "margin": options.margin,
        "space": space.plain(),
        "measurements": identity(measured),
        "objective": [options.objective, list(objective.weights), options.pareto],
        "sampler": options.sampler,
        "seed": options.seed,
        "precision and device": {key: value for key, value in scorer.settings.record().items() if key != "threads"},
    }


def _yardstick(
    options: SearchOptions, scorer: Scorer, objective: Objective, losses: Losses
) -> tuple[Yardstick, list[str]]:
    """Score the pair's own models on all validation rows: what gains are measured with."""
    rows = {task.name: task.part(VALIDATION) for task in scorer.tasks if task.measures_gain}
    pair = [Entrant(f"model {one.name}", one) for one in models_of_pair(scorer.config)]
    losses.require(pair, rows)
    base = next(one for one in pair if one.candidate.role == "base")
    experts = {one.candidate.name: one.digest for one in pair if one.candidate.role == "expert"}
    by_row = {name: losses.table([one.digest for one in pair], {name: own}) for name, own in rows.items()}
    table = {name: own.sum(axis=1) for name, own in by_row.items()}
    if not all(np.isfinite(sums).all() for sums in table.values()):
        raise UserError(
            "the losses of the base or of an expert are not finite on validation rows; check the checkpoints, or give "
            "--dtype float32",
            "search-pair-not-finite",
        )
    places = {one.digest: place for place, one in enumerate(pair)}
    tokens = {name: losses.sizes(base.digest, {name: own}).sum() for name, own in rows.items()}
    before = np.array([table[name][places[base.digest]] / tokens[name] for name in rows])
    after, known = [], {}
    for task in (task for task in scorer.tasks if task.measures_gain):
        own = [experts[name] for name in task.experts if name in experts] or list(experts.values())
        best = min((places[digest] for digest in own), key=lambda place: table[task.name][place])
        after.append(table[task.name][best] / tokens[task.name])
        others = [place for digest in experts.values() if (place := places[digest]) != best]
        known[task.name] = known_of_rows(by_row[task.name], places[base.digest], best, others)
    scales, without = gain_scales(before, np.array(after))
    doubts = [
        f"on {objective.tasks[place]} no expert is better than the base ({after[place]:.4f} and {before[place]:.4f} nats per "
        "token), so that there is no gain to keep: the search goes by the loss there, as a share of the base's"
        for place in without
    ]
    return Yardstick(rows, base.digest, scales, objective, options.pareto, known), doubts


def memory_line(ready: Prepared) -> str:
    """What a pass over all rows takes of the memory that is free; empty where a cluster scores."""
    if ready.memory is None:
        return ""
    free = available_bytes(ready.scorer.settings.device)
    return (
        f"memory: about {gigabytes(ready.memory)} beside the runtime for a pass over all rows, {gigabytes(free)} free"
    )


def _say_choices(ready: Prepared, tried: Sequence[Known], say: Callable[[str], None]) -> None:
    options, space = ready.options, ready.space
    for task in ready.scorer.tasks:
        say(f"task {task.name}: {task.summary}")
    for name, one in ready.measured.items():
        say(f"measured: {name}, {from_here(one.folder)}")
    say(f"space: {len(space.ways)} ways to merge ({'; '.join(way.label for way in space.ways)})")
    if said := ready.maker.routers.said:
        say(f"routers of unguided recipes: {said}")
    free = [f"weights of {len(space.weighed)} experts" if space.weighed else ""]
    free += [f"{space.depth_groups} groups of blocks" if space.depth_groups else ""]
    beside = " and ".join(text for text in free if text)
    if beside:
        say(f"beside their numbers: {beside}")
    goal = "a Pareto front over the tasks" if options.pareto else options.figure
    say(f"objective: {goal}; sampler {ready.study.sampler} (seed {options.seed}), {options.batch} at a time")
    if memory := memory_line(ready):
        say(memory)
    if ready.written:
        say(f"disk: each recipe's model is written first, {gigabytes(ready.written)} at a time in {options.out_dir}")
    done = sum(trial.state.is_finished() for trial in ready.study.trials)
    say(
        f"trials: {options.trials}, of which {len(tried)} are what a careful user tries by hand"
        + (f"; {done} are done" if done else "")
    )
    if missing := untried(space, tried):
        say(
            f"not among these, since there are so few trials, but left to the sampler: {'; '.join(missing)} (with --trials "
            f"{trials_for(len(tried) + len(missing))} each is tried at its defaults)"
        )
