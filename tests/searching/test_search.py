"""Whole searches over simulated losses: what they find, that a kill changes nothing, that nothing is scored twice."""

import errno
import sqlite3
import sys
from contextlib import closing

import pytest

pytest.importorskip("optuna")

from tests.refusals import refused
from tests.searching.simulated import BEST, KNOWNS, Formula, a_search, outcome, run, space
from tests.selected import few
from utils.errors import UserError
from utils.searching.knowns import Known
from utils.searching.points import LAMBDA, Point
from utils.searching.storage import require_optuna
from utils.searching.study import Began, SearchStudy, stored_beginning


def test_the_search_beats_what_is_known_and_reads_few_rows(tmp_path):
    score = Formula()
    search = a_search(tmp_path, score)
    run(search, 28)
    finished = search.study.finished(48)
    best = max(finished, key=lambda trial: sum(trial.gains.values()))
    off = best.point.numbers["lambda"] - BEST[best.point.merge_method]
    assert 0.6 * off**2 < 0.02  # of a loss where the knowns' best is 0.0135 off, and noise 0.01
    states = [trial.state.name for trial in search.study.trials]
    assert len(states) == 28 and states.count("COMPLETE") > 20
    assert len(set(score.scored)) == len(score.scored)
    assert len(score.scored) < 0.85 * (28 + 2) * 48  # most rows were never read


def test_what_is_not_finite_is_a_failed_trial_and_not_the_end(tmp_path):
    """Every TIES of a lambda above 0.95 comes to NaN."""
    search = a_search(tmp_path, Formula(), sampler="random")
    run(search, 14)
    trials = search.study.trials
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert failed and len(trials) == 14
    assert all(trial.user_attrs["point"]["numbers"]["lambda"] > 0.95 for trial in failed)
    assert all("finite" in trial.user_attrs["failure"] for trial in failed)


def test_a_read_that_fails_is_no_failed_trial_but_the_end_of_the_run(tmp_path):
    """What cannot be read now could be later: a trial that failed for that would be missing for good."""
    unbroken = a_search(tmp_path / "unbroken", Formula())
    run(unbroken, 6)
    search = a_search(tmp_path / "broken", Formula())

    def unreadable(candidate):
        raise UserError("config.json cannot be read", "model-small-file") from OSError(errno.EIO, "Input/output error")

    search.check = unreadable
    with refused("model-small-file"):
        run(search, 6)
    search = a_search(tmp_path / "broken", Formula())
    run(search, 6)
    assert outcome(search) == outcome(unbroken)


def test_knowns_come_first_and_those_outside_the_space_too(tmp_path):
    search = a_search(tmp_path, Formula())
    run(search, 4)
    trials = search.study.trials
    assert [trial.user_attrs.get("known") for trial in trials] == [*(known.name for known in KNOWNS), None]
    assert trials[0].params == {
        "method": "task_arithmetic, uniform",
        "lambda": 0.3,
        "weight.code": 1.0,
        "weight.math": 1.0,
    }
    assert trials[2].params == {} and trials[2].state.name == "COMPLETE"


@pytest.mark.parametrize("sampler", few(["tpe", "random"], "tpe"))
def test_killed_anywhere_and_typed_again_it_comes_to_the_same(tmp_path, sampler):
    whole = Formula()
    unbroken = a_search(tmp_path / "unbroken", whole, sampler=sampler)
    run(unbroken, 11)
    expected = outcome(unbroken)
    for stop in (2, 7):
        folder, scored = tmp_path / f"killed{stop}", []
        for tried in range(100):
            score = Formula(stop_after=stop if tried else 1)
            try:
                search = a_search(folder, score, sampler=sampler)
                run(search, 11)
                break
            except KeyboardInterrupt:
                continue
            finally:
                scored += score.scored
        assert outcome(search) == expected
        assert sorted(scored) == sorted(whole.scored)  # nothing twice


def test_killed_meanwhile_it_comes_to_the_same(tmp_path, monkeypatch):
    unbroken = a_search(tmp_path / "unbroken", Formula())
    run(unbroken, 13)
    for stop in (1, 9):
        folder, count = tmp_path / f"killed{stop}", 0
        search = a_search(folder, Formula())
        known = search.study.tell

        def tell(*arguments, stop=stop, known=known):
            nonlocal count
            count += 1
            if count > stop:
                raise KeyboardInterrupt
            known(*arguments)

        monkeypatch.setattr(search.study, "tell", tell)
        with pytest.raises(KeyboardInterrupt):
            run(search, 13)
        again = a_search(folder, Formula())
        run(again, 13)
        assert outcome(again) == outcome(unbroken)


@pytest.mark.parametrize(
    ("kind", "name", "stops"),
    [
        ("Trial", "set_user_attr", (0, 1, 4)),  # the first trials that are asked for have two notes each
        # The one that was being tried comes again in its old place, before those that were waiting.
        ("Study", "ask", (1, 2)),
    ],
)
def test_killed_between_two_trials_or_two_notes_of_one_it_comes_to_the_same(tmp_path, monkeypatch, kind, name, stops):
    import optuna

    unbroken = a_search(tmp_path / "unbroken", Formula())
    run(unbroken, 8)
    owner = getattr(optuna, kind)
    known = getattr(owner, name)
    for stop in stops:
        left = stop

        def call(*arguments):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return known(*arguments)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, name, call)
            run(a_search(tmp_path / f"killed{stop}", Formula()), 8)
        again = a_search(tmp_path / f"killed{stop}", Formula())
        run(again, 8)
        assert outcome(again) == outcome(unbroken)


@pytest.mark.parametrize("pareto", [False, True])
def test_the_best_uniform_one_reads_every_row_however_far_behind_it_is(tmp_path, pareto):
    """It is what the winner is compared with."""
    numbers = {"far": 1.0, "farther": 1.2, "farthest": 1.4}
    knowns = [Known(name, Point("task_arithmetic", "uniform", {LAMBDA: value})) for name, value in numbers.items()]
    knowns += [Known("best", Point("task_arithmetic", "lines", {LAMBDA: 0.45}))]
    search = a_search(tmp_path, Formula(), knowns=knowns, pareto=pareto)
    run(search, 4)
    assert {trial.known for trial in search.study.finished(48)} == {"far", "best"}
    assert {trial.known for trial in search.study.finished()} == {*numbers, "best"}
    run(search, 9)
    assert {racer.uniform for racer in search.champions(10**6)} == {True, False}


def test_more_trials_extend_a_search(tmp_path):
    whole = a_search(tmp_path / "whole", Formula())
    run(whole, 13)
    for trials in (8, 13):
        search = a_search(tmp_path / "extended", Formula())
        run(search, trials)
        assert len(search.study.trials) == trials
    assert outcome(search) == outcome(whole)


def test_knowns_that_were_too_many_are_tried_when_a_search_is_extended(tmp_path):
    run(a_search(tmp_path, Formula(), knowns=KNOWNS[:1]), 4)
    search = a_search(tmp_path, Formula())
    run(search, 8)
    tried = {one.known for one in search.study.finished() if one.known}
    assert tried == {known.name for known in KNOWNS} and len(search.study.trials) == 8


def test_a_study_of_another_space_is_refused(tmp_path):
    run(a_search(tmp_path, Formula()), 4)
    with refused("search-other-study") as caught:
        a_search(tmp_path, Formula(), merge_method=("ties",))
    assert "space" in str(caught.value)


def test_what_another_search_was_for_is_said_as_it_is_typed(tmp_path):
    made = {"sampler": "random", "seed": 0}
    SearchStudy(tmp_path, space(), {"objective": ["weighted", [2.0, 1.0], True]}, **made).close()
    with refused("search-other-study", "with --objective weighted, with --pareto"):
        SearchStudy(tmp_path, space(), {"objective": ["mean", [1.0, 1.0], False]}, **made)


def test_a_search_that_did_not_record_its_margin_had_none(tmp_path):
    def study(**identity) -> SearchStudy:
        return SearchStudy(tmp_path, space(), {"pair": "simulated", **identity}, sampler="random", seed=0)

    for identity in ({}, {}, {"margin": 0.0}):
        study(**identity).close()
    with refused("search-other-study") as caught:
        study(margin=0.5)
    assert "margin" in str(caught.value) and "--margin 0" in str(caught.value)


def test_what_a_study_began_with_is_read_back(tmp_path):
    assert stored_beginning(tmp_path) is None
    there, why = {"lewis": "aa"}, {"tuned": "guidance tuned is left out"}
    for left_out in (why, {}):
        SearchStudy(tmp_path, space(), {"measurements": there}, sampler="random", seed=0, left_out=left_out).close()
    assert stored_beginning(tmp_path) == Began(there, why) and [path.name for path in tmp_path.iterdir()] == [
        "study.db"
    ]


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "study.db").write_bytes(b"not a database " * 100)
    with refused("search-storage-unusable"):
        a_search(tmp_path, Formula())
    assert (tmp_path / "study.db").read_bytes() == b"not a database " * 100


@pytest.mark.parametrize("linked", [False, True])
def test_a_database_of_somebody_else_is_refused_and_stays_as_it_is(tmp_path, linked):
    (tmp_path / "search").mkdir()
    place = tmp_path / "search" / "study.db"
    file = tmp_path / "mine.db" if linked else place
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("create table mine (x)")
    if linked:
        place.symlink_to(file)
    before = file.read_bytes()
    with refused("search-storage-foreign"):
        a_search(tmp_path / "search", Formula())
    assert file.read_bytes() == before and [path.name for path in place.parent.iterdir()] == ["study.db"]


def test_a_front_keeps_what_is_best_at_either_task(tmp_path):
    search = a_search(tmp_path, Formula(), pareto=True)
    run(search, 9)
    trials = [trial for trial in search.study.trials if trial.state.name == "COMPLETE"]
    assert all(len(trial.values) == 2 for trial in trials)
    front = [racer.entrant.digest for racer in search.champions(10**6)]
    assert front and len(front) == len(set(front))


def test_the_dashboards_view_of_the_storage(tmp_path):
    """What optuna-dashboard reads: the study by its name in the file, through Optuna's own loader."""
    import optuna

    run(a_search(tmp_path, Formula()), 8)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.metric_names == ["mean gain kept"]
    assert len(study.trials) == 8 and study.best_trial.user_attrs["point"]


def test_a_gaussian_process_searches_numbers(tmp_path):
    search = a_search(tmp_path, Formula(), sampler="gp")
    run(search, 9)
    assert len(search.study.trials) == 9


def test_without_optuna_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with refused("search-optuna-missing") as caught:
        require_optuna()
    assert "pip install -r requirements-search.txt" in str(caught.value)
