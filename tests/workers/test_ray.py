"""One run of everything on Ray, in this process; what takes longer is in `test_ray_cluster.py`."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray")

from tests.refusals import refused
from tests.tiny_pairs import contents, save_pair, write_config
from tests.workers.clusters import own_ray
from tests.workers.pieces import doubling, refuse, threads
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.ray_flags import RayFlags
from utils.guidance.method import guidance_methods
from utils.pair.config import read_pair_config
from utils.workers.piece import Piece
from utils.workers.ray_cluster import ClusterShare, ray_workers


def measured(out: str, ray: RayFlags | None) -> dict[str, object]:
    """What command 1 writes, in small micro-batches, of which a task has eight."""
    measure_pair(
        MeasureOptions(
            read_pair_config(Path("pair.yaml")),
            guidance_methods()["lewis"],
            {},
            Path(out),
            device="auto" if ray else "cpu",
            devices=None if ray else "cpu",
            dtype="float32",
            micro_batch_tokens=32,
            quiet=True,
            ray=ray,
        )
    )
    return contents(Path(out))


def test_pieces_and_command_1_on_ray_come_to_what_they_come_to_here(tmp_path, monkeypatch):
    monkeypatch.chdir(save_pair(tmp_path))
    write_config(tmp_path, {"nsamples": 12})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    here = measured("here", None)
    torch.set_num_threads(before)
    work = tmp_path / "work"
    work.mkdir()
    with own_ray(1), ray_workers("local", ClusterShare()) as workers:
        assert (workers.at_once, workers.gpus, workers.device) == (1, 0, torch.device("cpu"))
        pieces = [*doubling(2, tmp_path / "log"), Piece("threads", threads)]
        first = workers.run(pieces, work, lambda label, steps: None)
        assert [first[0].twice, first[1].twice, first[2]] == [0, 2, (1, "cpu")]
        with refused("test-refused"):
            workers.run([Piece("bad", refuse, ("no",))], work, lambda label, steps: None)
        workers.run(pieces, work, lambda label, steps: None)
        lines = (tmp_path / "log").read_text().splitlines()
        assert len(lines) == 2  # nothing was done twice, nor here
        assert str(os.getpid()) not in [line.split()[1] for line in lines]
        assert measured("there", RayFlags("local")) == here
        assert not list(Path("there").glob(".*"))
