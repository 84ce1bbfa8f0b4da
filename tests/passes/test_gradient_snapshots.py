"""A way forward and back that was stopped goes on where it stood, to the very same bits.

python -m pytest tests/passes/test_gradient_snapshots.py
"""

import errno
import os
import weakref

import pytest
import torch

from tests.faulty import Failing, full
from tests.plain_gradients import CPU, opened, token_lists
from tests.tiny_checkpoints import LAYERS, save_any
from utils.passes import snapshots
from utils.passes.block_gradients import observe_gradients
from utils.passes.gradient_snapshots import GradientSnapshots


@pytest.fixture(autouse=True)
def at_every_block(monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", -1.0)
    monkeypatch.setattr(snapshots, "MOST_SHARE", float("inf"))


class Sums:
    """Sums up every parameter's gradient, whatever the order of the samples makes of its bits."""

    def __init__(self, found):
        self.sums = found or {}

    def wants(self, name):
        return True

    def gradient(self, name, parameter, gradient, sample):
        self.sums[name] = self.sums.get(name, 0) + gradient * (sample + 1)

    def finish(self, layer, parameters):
        pass


class Stopped(Exception):
    pass


def run(folder, path, stop_at=None, dtype=torch.float32):
    """Losses, sums, and the blocks that were fetched; stopped at a number of blocks passed on both ways."""
    decoder, weights = opened(folder, dtype)
    fetched, fetch, passed = [], weights.fetch, []
    weights.fetch = lambda names: fetched.append(names[0]) or fetch(names)

    def on_block(layer):
        passed.append(layer)
        if len(passed) == stop_at:
            raise Stopped

    kept = GradientSnapshots(path)
    observer = Sums(kept.found("sums"))
    kept.keep("sums", lambda: observer.sums)
    losses = observe_gradients(
        decoder, weights, token_lists(), observer, CPU, outside=True, on_block=on_block, snapshots=kept
    )
    kept.forget()
    assert passed == [*range(LAYERS), *reversed(range(LAYERS))]
    return losses, observer.sums, len(fetched) - 1  # what lies outside the blocks comes first


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_a_stopped_way_goes_on_to_the_same_bits(tmp_path, family):
    folder, path = save_any(family, tmp_path / "model"), tmp_path / "piece.snapshot"
    losses, sums, fetched = run(folder, None)
    assert fetched == 2 * LAYERS
    for stop_at in (LAYERS, LAYERS + 1, 2 * LAYERS - 1):
        with pytest.raises(Stopped):
            run(folder, path, stop_at)
        again, sums_again, fetched_again = run(folder, path)
        assert fetched_again <= fetched - stop_at + 1
        assert losses == again and sums.keys() == sums_again.keys()
        assert all(torch.equal(sums[name], sums_again[name]) for name in sums)
        assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_it_may_be_stopped_again_and_again(tmp_path):
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "piece.snapshot"
    losses, sums, _ = run(folder, None, dtype=torch.bfloat16)
    for stop_at in range(2, 2 * LAYERS + 1):
        with pytest.raises(Stopped):
            run(folder, path, stop_at, dtype=torch.bfloat16)
    again, sums_again, _ = run(folder, path, dtype=torch.bfloat16)
    assert losses == again and all(torch.equal(sums[name], sums_again[name]) for name in sums)


@pytest.mark.parametrize("damage", ["half a snapshot", "no states", "short states", "another bit"])
def test_what_is_damaged_is_not_used(tmp_path, damage, capsys):
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "piece.snapshot"
    with pytest.raises(Stopped):
        run(folder, path, LAYERS + 1)
    states = path.with_suffix(".model")
    if damage == "no states":
        states.unlink()
    elif damage == "another bit":
        content = bytearray(states.read_bytes())
        content[5] ^= 1
        states.write_bytes(content)
    else:
        damaged = states if damage == "short states" else path
        damaged.write_bytes(damaged.read_bytes()[:100])
    assert run(folder, path)[2] == 2 * LAYERS
    assert "not as it was left" in capsys.readouterr().err


def test_a_full_disk_costs_no_more_than_the_snapshots(tmp_path, capsys):
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "piece.snapshot"
    losses, sums, fetched = run(folder, None)
    with pytest.raises(Stopped):
        run(folder, path, LAYERS + 1)
    kept, full = path.read_bytes(), path.with_suffix(".writing")
    for stop_at in (LAYERS + 2, None):
        full.symlink_to("/dev/full")
        if stop_at:
            with pytest.raises(Stopped):
                run(folder, path, stop_at)
            assert path.read_bytes() == kept and not full.exists()
        else:
            again, sums_again, fetched_again = run(folder, path)
        assert capsys.readouterr().err.count("No space left on device") == 1
    assert fetched_again < fetched and losses == again
    assert all(torch.equal(sums[name], sums_again[name]) for name in sums)


def test_states_in_the_hosts_memory_do_without_a_file_on_a_full_disk(tmp_path, capsys):
    path = tmp_path / "piece.snapshot"
    path.with_suffix(".model").symlink_to("/dev/full")
    kept = GradientSnapshots(path)
    store = kept.store("model", torch.device("meta"), None)
    stored = store.put(torch.ones(3))
    kept.offer()
    kept.offer()
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert store.take(stored).shape == (3,) and not path.exists()


def test_nothing_is_held_once_it_was_given_or_the_work_is_over(tmp_path):
    path = tmp_path / "piece.snapshot"
    first = GradientSnapshots(path)
    first.keep("sums", lambda: {"of": torch.ones(3)})
    first.offer()
    second = GradientSnapshots(path)
    found = second.found("sums")
    sums = weakref.ref(found["of"])
    second.keep("sums", lambda found=found: found)
    del found
    assert second.found("sums") is None and sums() is not None
    second.forget()
    assert sums() is None


def test_snapshots_are_as_rare_as_they_are_dear(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", 3600.0)
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "piece.snapshot"
    with pytest.raises(Stopped):
        run(folder, path, 2 * LAYERS)
    assert not path.exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_handed_over_is_gone_on_with_where_it_can_have_two_names(tmp_path, monkeypatch, links):
    path, target = tmp_path / "piece.snapshot", tmp_path / "result"
    first = GradientSnapshots(path)
    first.growing_file("sums").write_bytes(b"1234")
    first.grow("sums", lambda: 4)
    first.keep("measured", lambda: [1])
    first.offer()
    if not links:
        monkeypatch.setattr(os, "link", Failing(os.link, 1, full(errno.EPERM)))
    first.hand_over("sums", target)
    assert target.read_bytes() == b"1234"
    assert GradientSnapshots(path).found("measured") == ([1] if links else None)
