"""On clusters of several machines (simulated by Ray on this one): the same bits on 1, 2 and 5 workers and after a machine was lost."""

import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

pytest.importorskip("ray")

from tests.refusals import refused
from tests.tiny_evaluations import save_evaluated_pair
from tests.tiny_experts import save_experts
from tests.tiny_pairs import CALIBRATION, contents, save_pair, write_config
from tests.workers.clusters import add_node, own_ray, several_nodes
from tests.workers.pieces import stop, stop_the_first_time, sum_slowly, threads
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.ray_flags import RayFlags
from utils.commands.scorers import make_scorers
from utils.commands.search_options import SearchOptions
from utils.evaluation.candidates import models_of_pair
from utils.evaluation.controls import uniform_controls
from utils.evaluation.placing import Cluster, score_placed
from utils.evaluation.store import LossStore
from utils.guidance.method import guidance_methods
from utils.guidance.start import with_start
from utils.pair.config import read_pair_config
from utils.workers.local import LocalWorkers
from utils.workers.piece import Piece
from utils.workers.ray_cluster import ClusterShare, ray_workers

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """What tasks compute with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pair(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(save_pair(tmp_path))
    write_config(tmp_path, {"nsamples": 12, "calibration": CALIBRATION})
    return tmp_path


def measured(out: str, name: str = "lewis", ray: RayFlags | None = None, **asked: object) -> dict[str, object]:
    method = with_start(guidance_methods()[name], asked)
    own = {flag.name: flag.default for flag in method.measure_flags}
    own |= asked | ({"accept_useless_text": True} if "accept_useless_text" in own else {})
    config = read_pair_config(Path("pair.yaml"))
    where = {"ray": ray} if ray else {"devices": "cpu"}
    measure_pair(MeasureOptions(config, method, own, Path(out), micro_batch_tokens=32, quiet=True, **where))
    return contents(Path(out))


def summing(count: int, seconds: float = 0.0) -> list[Piece]:
    return [Piece(f"sum{seed}", sum_slowly, (seed, seconds), 1, f"sum {seed}") for seed in range(count)]


def test_one_two_and_five_workers_come_to_the_same_bytes(pair):
    pieces = summing(9)
    expected = LocalWorkers((CPU,)).run(pieces, None, lambda label, steps: None)
    here = measured("here")
    with several_nodes(1) as (cluster, _):
        for more, workers in ((0, 1), (1, 2), (3, 5)):
            if more:
                add_node(cluster, more)
                cluster.wait_for_nodes()
            (work := pair / f"work{workers}").mkdir()
            with ray_workers("auto", ClusterShare()) as ray:
                assert ray.at_once == workers
                found = ray.run(pieces, work, lambda label, steps: None)
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
            assert measured(f"there{workers}", ray=RayFlags("auto")) == here


def test_every_guidance_measures_the_same_on_a_cluster(pair):
    with own_ray():
        for name in sorted(guidance_methods()):
            assert measured(f"there_{name}", name, RayFlags("local")) == measured(f"here_{name}", name)
        best = {"start": "gram_mean", "rounds": 2}
        assert measured("there", "tuned", RayFlags("local"), **best) == measured("here", "tuned", **best)


def test_a_machine_that_is_lost_half_way_costs_its_running_tasks(pair):
    pieces, lost = summing(10, seconds=1.0), []
    expected = LocalWorkers((CPU,)).run(summing(10), None, lambda label, steps: None)
    work = pair / "work"
    work.mkdir()
    with several_nodes(1) as (cluster, _):
        second = add_node(cluster, 2)
        cluster.wait_for_nodes()

        def lose_one() -> None:
            while len(list(work.glob("sum*"))) < 3:
                time.sleep(0.05)
            lost.append(sorted(path.name for path in work.glob("sum*")))
            cluster.remove_node(second, allow_graceful=False)

        thread = threading.Thread(target=lose_one)
        with ray_workers("auto", ClusterShare()) as ray:
            thread.start()
            found = ray.run(pieces, work, lambda label, steps: None)
            thread.join()
    assert 3 <= len(lost[0]) < 10
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_command_1_writes_the_same_after_a_machine_was_lost(pair):
    here = measured("here")
    with several_nodes(1) as (cluster, _):
        second = add_node(cluster, 1)
        cluster.wait_for_nodes()

        def lose_one() -> None:
            while not list(Path("there").glob(".measuring.part/*/*+*/result.pt")):
                time.sleep(0.02)
            cluster.remove_node(second, allow_graceful=False)

        thread = threading.Thread(target=lose_one)
        thread.start()
        assert measured("there", ray=RayFlags("auto")) == here
        thread.join()


def test_a_process_that_dies_is_replaced_and_one_that_always_dies_is_reported(tmp_path):
    with own_ray(1), ray_workers("local", ClusterShare()) as ray:
        (found,) = ray.run(
            [Piece("once", stop_the_first_time, (tmp_path / "mark",))], tmp_path, lambda label, steps: None
        )
        assert found == "done"
        with refused("workers-lost"):
            ray.run([Piece("always", stop)], tmp_path, lambda label, steps: None)


def test_a_share_that_no_machine_has_is_refused(tmp_path):
    with own_ray(1):
        for share in (ClusterShare(cpus=2), ClusterShare(gpus=1)):
            with refused("workers-share-too-large"), ray_workers("local", share):
                raise AssertionError("there is such a machine")


def test_pieces_take_their_share_of_a_gpu_and_say_where_there_is_none(tmp_path):
    """Ray believes in the GPU; whether torch sees it shows in the task."""
    with own_ray(4, gpus=1):
        with ray_workers("local", ClusterShare(gpus=0.5)) as ray:
            assert (ray.at_once, ray.device.type) == (2, "cuda")
        with ray_workers("local", ClusterShare()) as ray:
            assert (ray.at_once, ray.gpus) == (1, 1)
            if not torch.cuda.is_available():
                with refused("workers-no-gpu"):
                    ray.run([Piece("threads", threads)], tmp_path, lambda label, steps: None)
        with ray_workers("local", ClusterShare(gpus=0)) as ray:
            assert (ray.at_once, ray.device.type) == (4, "cpu")


def test_a_killed_command_goes_on_with_what_is_missing(pair, monkeypatch):
    here = measured("here")
    with own_ray():

        def interrupt(*given: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("utils.commands.measure.with_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measured("there", ray=RayFlags("local"))
        monkeypatch.undo()
        monkeypatch.chdir(pair)
        results = list(Path("there").glob(".measuring.part/*/*/result.pt"))
        assert results
        assert measured("there", ray=RayFlags("local")) == here


def test_candidates_have_the_same_losses_on_a_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = save_evaluated_pair(tmp_path / "pair")
    config = read_pair_config(pair / "pair.yaml")
    grid = uniform_controls(config, "float32")
    candidates = [*models_of_pair(config), *(one for kind in grid.values() for one in kind)][:6]
    options = SearchOptions(config, tmp_path, validation_rows=6, test_rows=4)
    (scorer,) = make_scorers(options, [CPU])
    rows = {task.name: task.part("validation") for task in scorer.tasks}
    here, scored = score_placed([scorer], LossStore(tmp_path / "here"), candidates, rows)
    assert scored == len(candidates)
    two = make_scorers(options, [CPU, CPU])
    beside, scored = score_placed(two, LossStore(tmp_path / "beside"), candidates, rows)
    pd.testing.assert_frame_equal(beside, here, check_exact=True)
    assert scored == len(candidates)
    (tmp_path / "work").mkdir()
    with own_ray(), ray_workers("local", ClusterShare()) as ray:
        (speaker,) = make_scorers(options, [ray.device], workers=ray)
        store = LossStore(tmp_path / "there")
        cluster = Cluster(ray, tmp_path / "work")
        there, scored = score_placed([speaker], store, candidates, rows, cluster)
        pd.testing.assert_frame_equal(there, here, check_exact=True)
        assert scored == len(candidates) and not list((tmp_path / "work").iterdir())
        assert score_placed([speaker], store, candidates, rows, cluster)[1] == 0


def test_a_search_finds_the_same_on_a_cluster(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from utils.commands.search import search_pair

    (tmp_path / "pair").mkdir()
    pair = save_experts(tmp_path / "pair")
    config = yaml.safe_load((pair / "pair.yaml").read_text())
    write_config(pair, {**config, "search": {"guidance": ["uniform", "lines"], "depth_groups": 1}})
    monkeypatch.chdir(pair)

    def searched(out: str, **where: object) -> list[pd.DataFrame]:
        rows = {"validation_rows": 16, "test_rows": 16, "first_rows": 4}
        given = {"trials": 8, "batch": 4, "quiet": True, **rows, **where}
        search_pair(SearchOptions(read_pair_config(Path("pair.yaml")), Path(out), **given))
        trials = pd.read_csv(Path(out, "trials.csv")).drop(columns="seconds")
        return [trials, pd.read_csv(Path(out, "scores.csv"))]

    here = searched("here", device="cpu")
    with several_nodes(1) as (cluster, _):
        add_node(cluster, 2)
        cluster.wait_for_nodes()
        there = searched("there", ray=RayFlags("auto"))
    for one, two in zip(here, there, strict=True):
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert Path("here/best.yaml").read_bytes() == Path("there/best.yaml").read_bytes()
    assert not list(Path("there").glob(".*"))
