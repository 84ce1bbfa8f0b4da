"""The Optuna study of one search: its storage, its sampler, what is asked of it and told to it.

Optuna 5 (`requirements-search.txt`) samples, stores, queues and ranks; `optuna-dashboard sqlite:///OUT_DIR/study.db` reads
the file. One process writes it, which holds the folder's lock, so that a trial that is running when a search begins was
left by a run that ended: it is put back into the queue (Optuna's heartbeat would wait for it to go stale first).

A sampler is made anew for every trial, from the seed and the number of trials before it. So what is asked depends on the
study alone: a search that was killed and typed again asks what it would have asked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from utils.errors import UserError
from utils.searching.knowns import Known
from utils.searching.points import Point
from utils.searching.space import Space
from utils.searching.storage import STORAGE, open_storage, require_optuna, storage_guarded, without_warnings

if TYPE_CHECKING:
    import optuna

STUDY = "search"
Sampler = Literal["auto", "tpe", "gp", "random"]

_IDENTITY, _POINT, _KNOWN, _BATCH = "identity", "point", "known", "batch"
_INTERRUPTED, _AGAIN, _PLACE = "interrupted", "again_of", "place"
_LEFT_OUT = "left_out"
_FAILURE, _ROWS, _DIGEST, _GAINS = "failure", "rows", "digest", "gains"
_BEFORE = {"margin": 0.0}  # what searches went by that did not record it
_FLAGS = {"margin": "--margin", "rows of the first round": "--first_rows", "sampler": "--sampler", "seed": "--seed"}


@dataclass(frozen=True)
class Finished:
    """A trial that has a value: what was tried, its gains by task, and whether it saw every row of the race."""

    number: int
    batch: int
    digest: str
    known: str
    point: Point
    gains: Mapping[str, float]
    whole: bool


class SearchStudy:
    """A study in a folder. State: Optuna's.

    Args:
        folder: the search's folder.
        space: what is searched.
        identity: everything that makes trials comparable, by label; another identity is another study.
        sampler: `auto`, `tpe`, `gp` or `random`.
        seed: of the sampler.
        tasks: more than one for a Pareto front, whose values are the gains on each.
        left_out: why guidances could not be measured; a study that begins notes it, so that nobody tries again.

    Raises:
        UserError: Optuna is not installed, the file is no study, or it is another search's.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        identity: Mapping[str, Any],
        *,
        sampler: Sampler,
        seed: int,
        tasks: Sequence[str] = ("mean",),
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.space, self.seed, self.tasks = space, seed, tuple(tasks)
        self.sampler = sampler if sampler != "auto" else ("gp" if space.continuous() else "tpe")
        self._optuna = require_optuna()
        self.storage, self.study = self._open(folder, identity, left_out)
        self._put_back()

    @property
    def trials(self) -> "list[optuna.trial.FrozenTrial]":
        """All trials but those a kill interrupted, in order; they come again with another number, in their old place."""
        found = [trial for trial in self.study.get_trials(deepcopy=False) if _INTERRUPTED not in trial.user_attrs]
        return sorted(found, key=lambda trial: trial.user_attrs.get(_PLACE, trial.number))

    def queue(self, knowns: Sequence[Known]) -> None:
        """Queue the knowns, which are the first batch; does nothing if they were queued before."""
        there = {trial.user_attrs.get(_KNOWN) for trial in self.trials}
        for known in knowns:
            if known.name in there:
                continue
            attributes = {_KNOWN: known.name, _POINT: known.point.plain(), _BATCH: 0}
            self.study.enqueue_trial(self.space.parameters(known.point) or {}, user_attrs=attributes)

    def next_batch(self, trials: int, most: int) -> tuple[int, int] | None:
        """The batch to run, and how many trials it has: one that an earlier run left unfinished (what is queued is in it),
        else a new one of at most `most`, so that there are no more than `trials` in all; None when that is reached."""
        batches = [trial.user_attrs[_BATCH] for trial in self.trials if _BATCH in trial.user_attrs]
        left = [trial.user_attrs[_BATCH] for trial in self.trials if not trial.state.is_finished()]
        number = min(left) if left else 1 + max(batches, default=-1)
        own = batches.count(number)
        left = max(own, min(most, trials - (len(batches) - own)))
        if number == 0 or left <= 0:  # the knowns are a batch of their own, as many as they are
            return (number, own) if left else None
        return number, left

    def ask(self, batch: int, count: int) -> "list[tuple[optuna.Trial, Point]]":
        """The next trials of a batch, at most `count`: what is queued first, then what the sampler chooses."""
        found = []
        waiting = sum(trial.state == self._optuna.trial.TrialState.WAITING for trial in self.trials)
        for _ in range(max(count, waiting)):
            asked = len([trial for trial in self.trials if trial.state.name != "WAITING"])
            self.study.sampler = self._sampler(asked)
            trial = self.study.ask()
            found.append((trial, self._point(trial, batch)))
        return found

    def batch(self, number: int) -> "list[optuna.trial.FrozenTrial]":
        """All trials of a batch that have been asked for, in order."""
        return [
            trial for trial in self.trials if trial.user_attrs.get(_BATCH) == number and trial.state.name != "WAITING"
        ]

    def finished(self, all_rows: int | None = None) -> list[Finished]:
        """The trials that have a value; with `all_rows` only those that saw so many rows."""
        found = []
        for place, trial in enumerate(self.trials):  # as they are counted without interrupted ones
            own = trial.user_attrs
            if trial.state.name != "COMPLETE":
                continue
            seen, there = own[_ROWS]
            if all_rows is None or seen == all_rows:
                point = Point.read(own[_POINT])
                found.append(
                    Finished(place, own[_BATCH], own[_DIGEST], own.get(_KNOWN, ""), point, own[_GAINS], seen == there)
                )
        return found

    def note(self, number: int, digest: str) -> None:
        """Note a running trial's recipe."""
        if not self._trial(number).state.is_finished():
            self._set(number, _DIGEST, digest)

    def tell(self, number: int, values: Sequence[float], gains: Mapping[str, float], rows: int, all_rows: int) -> None:
        """Tell a trial's values: those on all rows, or what they come to as far as `rows` of them tell."""
        trial = self._trial(number)
        if trial.state.is_finished():
            return
        self._set(number, _GAINS, dict(gains))
        self._set(number, _ROWS, [rows, all_rows])
        with without_warnings():
            self.study.tell(number, list(values))

    def fail(self, number: int, why: str) -> None:
        """Tell that a trial has no value, and why."""
        if self._trial(number).state.is_finished():
            return
        self._set(number, _FAILURE, why)
        with without_warnings():
            self.study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def close(self) -> None:
        """Close the storage, so that all of it is in its one file."""
        self.storage.engine.dispose()

    def importances(self) -> dict[str, float]:
        """How much each parameter mattered (Optuna's PED-ANOVA), largest first; empty where that cannot be said yet."""
        complete = [trial for trial in self.trials if trial.state.name == "COMPLETE" and trial.params]
        if len(complete) < 8 or len({tuple(trial.values) for trial in complete}) < 2:
            return {}
        target = None if len(self.tasks) == 1 else (lambda trial: sum(trial.values) / len(trial.values))
        with without_warnings():
            try:
                return self._optuna.importance.get_param_importances(self.study, target=target)
            except (ValueError, RuntimeError):  # parameters that no two trials share, or that never changed
                return {}

    def _open(
        self, folder: Path, identity: Mapping[str, Any], left_out: Mapping[str, str]
    ) -> "tuple[optuna.storages.BaseStorage, optuna.Study]":
        with without_warnings(), storage_guarded(folder):
            storage = open_storage(folder)
            study = self._optuna.create_study(
                storage=storage,
                sampler=self._sampler(0),
                study_name=STUDY,
                directions=["maximize"] * len(self.tasks),
                load_if_exists=True,
            )
            plain = json.loads(json.dumps(identity))
            if _IDENTITY not in study.user_attrs:
                study.set_user_attr(_LEFT_OUT, dict(left_out))
                study.set_user_attr(_IDENTITY, plain)  # last: without it no study has begun
            _check_identity(study, plain, folder)
            study.set_metric_names(list(self.tasks))
        return storage, study

    def _put_back(self) -> None:
        """Queue again what was running when an earlier run ended, in its order."""
        state = self._optuna.trial.TrialState
        again = {trial.user_attrs.get(_AGAIN) for trial in self.trials}
        for trial in [trial for trial in self.trials if trial.state == state.RUNNING]:
            if _POINT in trial.user_attrs and trial.number not in again:  # else nothing was chosen, or it is queued
                with without_warnings():
                    self.study.add_trial(
                        self._optuna.trial.create_trial(
                            state=state.WAITING,
                            params=trial.params,
                            distributions=trial.distributions,
                            user_attrs={_PLACE: trial.number, **trial.user_attrs, _AGAIN: trial.number},
                        )
                    )
            self._set(trial.number, _INTERRUPTED, True)
            with without_warnings():
                self.study.tell(trial.number, state=state.FAIL)

    def _point(self, trial: "optuna.Trial", batch: int) -> Point:
        given = trial.user_attrs.get(_POINT)
        known = None if given is None else Point.read(given)
        if known is not None and self.space.parameters(known) is None:  # a known outside the space has no parameters
            return known
        with without_warnings():
            point = self.space.suggest(trial)
        if known is None:
            trial.set_user_attr(_BATCH, batch)
            trial.set_user_attr(_POINT, point.plain())  # last: a trial that has a point is queued again after a kill
        return known or point

    def _sampler(self, asked: int) -> "optuna.samplers.BaseSampler":
        samplers = self._optuna.samplers
        digest = hashlib.sha256(f"{self.seed} {asked}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        with without_warnings():
            if self.sampler == "random":
                return samplers.RandomSampler(seed=seed)
            if self.sampler == "gp":
                return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
            return samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, warn_independent_sampling=False
            )

    def _trial(self, number: int) -> "optuna.trial.FrozenTrial":
        return self.study.get_trials(deepcopy=False)[number]

    def _set(self, number: int, key: str, value: Any) -> None:
        study = self.storage.get_study_id_from_name(STUDY)
        trial = self.storage.get_trial_id_from_study_id_trial_number(study, number)
        self.storage.set_trial_user_attr(trial, key, value)


@dataclass(frozen=True)
class Began:
    """What a study began with: what its measurements are told apart by, by guidance; why others could not be measured."""

    measurements: Mapping[str, str]
    left_out: Mapping[str, str]


def stored_beginning(folder: Path) -> Began | None:
    """What a folder's study began with; None without a study.

    Raises:
        UserError: Optuna is not installed, or the file is no study.
    """
    if not (folder / STORAGE).exists():
        return None
    optuna = require_optuna()
    with without_warnings(), storage_guarded(folder):
        storage = open_storage(folder)
        try:
            found = optuna.load_study(study_name=STUDY, storage=storage).user_attrs
        except KeyError:  # a kill came before the study was made
            return None
        finally:
            storage.engine.dispose()
    return Began(found[_IDENTITY].get("measurements", {}), found.get(_LEFT_OUT, {})) if _IDENTITY in found else None


def _check_identity(study: "optuna.Study", identity: Mapping[str, Any], folder: Path) -> None:
    found = study.user_attrs[_IDENTITY]
    found = {key: value for key, value in _BEFORE.items() if key in identity} | found
    differing = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
    if differing:
        flags = [f" {_FLAGS[key]} {found[key]}" for key in differing if key in _FLAGS and key in found]
        if "objective" in differing and isinstance(before := found.get("objective"), list):
            figure, _, pareto = before
            flags.append(f" --objective {figure}, {'with' if pareto else 'without'} --pareto")
        raise UserError(
            f"--out_dir {folder} holds the study of another search (other: {', '.join(differing)}); its trials cannot be "
            f"compared with new ones. Choose another --out_dir, or search as before{' with' if flags else ''}{''.join(flags)}",
            "search-other-study",
        )
