"""A measurement that was stopped inside a model goes on there, to the same files.

python -m pytest tests/guidance/test_going_on.py
"""

import pytest

from tests.commands_here import done_here, run_here
from tests.tiny_pairs import save_pair
from utils.passes import snapshots
from utils.workers import local


@pytest.fixture(autouse=True)
def at_every_block(monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", -1.0)
    monkeypatch.setattr(snapshots, "MOST_SHARE", float("inf"))


def measured(folder):
    """The published files, without the times and places in the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize(
    ("method", "words", "stop_at"),
    [
        ("lewis", ("--dtype", "bfloat16"), 2),  # of 2 steps for each model and text
        ("lewis", ("--dtype", "bfloat16"), 4),
        ("saliency_budget", ("--gradient_at", "both"), 7),  # of 8 steps for each expert
        ("saliency_budget", ("--gradient_at", "expert"), 2),
        ("gram_mean", ("--accept_useless_text",), 2),  # of 8 steps, too
        ("gram_mean", ("--accept_useless_text",), 7),
        ("sens_merging", (), 3),
        ("sens_merging", (), 6),
    ],
)
def test_a_stopped_measurement_goes_on(tmp_path, monkeypatch, method, words, stop_at):
    save_pair(tmp_path)
    line = ("lewis_importance.py", "--config", "pair.yaml", "--guidance", method, *words, "--quiet")
    done_here(*line, "--out_dir", "whole", cwd=tmp_path)
    steps = []

    def stop():
        steps.append(1)
        if len(steps) == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(local, "return_freed_memory", stop)
        assert run_here(*line, "--out_dir", "out", cwd=tmp_path).returncode == 130
    assert len(steps) == stop_at
    assert [path for path in (tmp_path / "out").rglob("*.snapshot*") if path.is_file()]
    done_here(*line, "--out_dir", "out", cwd=tmp_path)
    assert measured(tmp_path / "out") == measured(tmp_path / "whole")
    assert not (tmp_path / "out" / ".measuring.part").exists()
