"""A pass that was stopped goes on where it stood, to the very same bits.

python -m pytest tests/passes/test_snapshots.py
"""

import zipfile

import pytest
import torch

from tests.plain_gradients import token_lists
from tests.tiny_checkpoints import LAYERS, save_any
from utils.guidance.lewis.visitor import LewisVisitor
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.pair.batches import micro_batches
from utils.passes import snapshots
from utils.passes.block_runner import run_blocks
from utils.passes.snapshots import Snapshots, read_state, write_state

CPU = torch.device("cpu")
LENGTHS = (17, 30, 5, 23, 11)


@pytest.fixture(autouse=True)
def at_every_block(monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", -1.0)
    monkeypatch.setattr(snapshots, "MOST_SHARE", float("inf"))


def run(folder, path, stop_after=None, sparsity=0.0):
    """Final hidden states, norms, and the blocks that text went through."""
    encoded = token_lists(LENGTHS)
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, torch.float32, trust_remote_code=False)
    decoder = find_decoder(model, None, {}, "test model")
    weights = StreamedWeights(stored_layout(model, checkpoint), CPU, torch.float32)
    tokens = sum(map(len, encoded))
    visitor = LewisVisitor(decoder, tokens, tokens, sparsity)
    observed = []
    observing = visitor.observing
    visitor.observing = lambda layer, block: observed.append(layer) or observing(layer, block)

    def on_block(layer):
        if layer == stop_after:
            raise KeyboardInterrupt

    kept = Snapshots(path)
    finals = run_blocks(
        decoder, weights, micro_batches(encoded, 64, pad_id=0), visitor, CPU, on_block=on_block, snapshots=kept
    )
    return finals, visitor.norms, observed


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "gpt_neox", "falcon"])
def test_a_stopped_pass_goes_on_to_the_same_bits(tmp_path, family, sparsity):
    folder, path = save_any(family, tmp_path / "model"), tmp_path / "pass.snapshot"
    finals, norms, observed = run(folder, None, sparsity=sparsity)
    assert observed == list(range(LAYERS))
    with pytest.raises(KeyboardInterrupt):
        run(folder, path, stop_after=1, sparsity=sparsity)
    assert path.is_file()
    again, norms_again, observed = run(folder, path, sparsity=sparsity)
    assert observed == list(range(1, LAYERS)) and not path.exists()
    assert norms.keys() == norms_again.keys() and all(torch.equal(norms[key], norms_again[key]) for key in norms)
    assert all(map(torch.equal, finals, again))


def test_a_damaged_snapshot_or_one_of_another_pass_is_not_used(tmp_path):
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "pass.snapshot"
    path.write_bytes(b"half")
    assert run(folder, path)[2] == list(range(LAYERS))
    with pytest.raises(KeyboardInterrupt):
        run(folder, path, stop_after=1)
    data = torch.load(path)
    torch.save({**data, "around": [[value + 1 for value in one] for one in data["around"]]}, path)
    assert run(folder, path)[2] == list(range(LAYERS))


def test_a_flipped_bit_is_noticed(tmp_path, capsys):
    """torch writes checksums, and does not compare them."""
    path = tmp_path / "pass.snapshot"
    write_state(path, {"sums": torch.arange(9.0)})
    content, number = path.read_bytes(), torch.tensor(7.0).numpy().tobytes()
    path.write_bytes(content.replace(number, torch.tensor(6.0).numpy().tobytes()))
    assert torch.load(path)["sums"][7] == 6
    assert read_state(path) is None and "is not as it was left" in capsys.readouterr().err
    path.write_bytes(content)
    assert read_state(path)["sums"][7] == 7


def test_snapshots_are_as_rare_as_they_are_dear(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", 3600.0)
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "pass.snapshot"
    with pytest.raises(KeyboardInterrupt):
        run(folder, path, stop_after=1)
    assert not path.exists()


def test_a_full_disk_costs_no_more_than_the_snapshots(tmp_path, capsys):
    folder, path = save_any("llama", tmp_path / "model"), tmp_path / "piece.snapshot"
    expected = run(folder, None)
    path.with_suffix(".writing").symlink_to("/dev/full")
    found = run(folder, path)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], expected[0], strict=True))
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_what_lay_on_a_gpu_is_read_where_there_is_none(tmp_path):
    path, elsewhere = tmp_path / "one.snapshot", tmp_path / "other.snapshot"
    write_state(path, {"sums": torch.ones(3)})
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(elsewhere, "w") as theirs:
        for name in ours.namelist():
            content = ours.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"X\x03\0\0\0cpu") == 1
                content = content.replace(b"X\x03\0\0\0cpu", b"X\x07\0\0\0cuda:99")
            theirs.writestr(name, content)
    assert read_state(elsewhere)["sums"].tolist() == [1, 1, 1]
