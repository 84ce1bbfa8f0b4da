"""Files written piece by piece in any order are those that safetensors writes at once."""

import errno
import json
import os
import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.faulty import Failing, full
from tests.refusals import refused
from utils.models.shard_files import ShardFiles, TensorSpec
from utils.models.tensor_files import as_bytes

NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(NAMES))),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 1000),
)
def test_one_file_equals_that_of_safetensors(tmp_path, shapes, seed):
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    pieces = [
        (name, start, as_bytes(tensor.view(-1))[start : start + 7])
        for name, tensor in tensors.items()
        for start in range(0, tensor.nbytes, 7)
    ]
    random.Random(seed).shuffle(pieces)
    with ShardFiles(tmp_path, [spec_of(*item) for item in tensors.items()], 0) as files:
        for name, start, content in pieces:
            files.write(name, start, content)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_filled_in_order_up_to_the_limit(tmp_path):
    tensors = {name: torch.full((size,), float(place)) for place, (name, size) in
               enumerate([("d", 10), ("a", 10), ("c", 100), ("b", 5)])}  # fmt: skip
    with ShardFiles(tmp_path, [spec_of(*item) for item in tensors.items()], 80) as files:
        for name, tensor in tensors.items():
            files.write(name, 0, as_bytes(tensor))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 500
    shard = "model-0000{}-of-00003.safetensors"
    assert index["weight_map"] == {
        "d": shard.format(1),
        "a": shard.format(1),
        "c": shard.format(2),
        "b": shard.format(3),
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    with ShardFiles(tmp_path, [TensorSpec("x", "float32", (3,))], 0) as files:
        monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, 1, full()))
        with refused("weights-unwritable"):
            files.write("x", 0, as_bytes(torch.ones(3)))


def test_a_limit_of_the_process_is_not_called_a_full_disk(tmp_path, monkeypatch):
    with ShardFiles(tmp_path, [TensorSpec("x", "float32", (3,))], 0) as files:
        monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, 1, full(errno.EFBIG)))
        with refused("weights-unwritable") as caught:
            files.write("x", 0, as_bytes(torch.ones(3)))
    assert "ulimit -f" in str(caught.value) and "make room" not in str(caught.value)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: write(file, content[:5], offset))
    with ShardFiles(tmp_path, [TensorSpec("x", "float32", (9,))], 0) as files:
        files.write("x", 0, as_bytes(torch.arange(9.0)))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], torch.arange(9.0))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with refused("weights-unwritable"), ShardFiles(tmp_path, [TensorSpec("x", "float32", (9,))], 0):
        pass
    assert (tmp_path / "model.safetensors").read_text() == "mine"
