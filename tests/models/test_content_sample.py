"""Copies, and the same tensors in other files, have one content; other numbers in the same layout have another.

python -m pytest tests/models/test_content_sample.py
"""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoints import save_tiny
from utils.models.content_sample import content_sample
from utils.models.opening import open_checkpoint
from utils.models.shard_files import INDEX
from utils.publishing.manifest import to_json


@pytest.fixture
def model(tmp_path):
    return save_tiny("llama", tmp_path / "model")


def sample(folder):
    return content_sample(open_checkpoint(str(folder)))


def test_a_copy_and_a_copy_in_several_files_are_the_same(model, tmp_path):
    before = sample(model)
    os.utime(model / "model.safetensors", (1, 1))
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    places = {name: f"part{place % 2}.safetensors" for place, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, copy / file)
    (copy / INDEX).write_bytes(to_json({"metadata": {}, "weight_map": places}))
    assert sample(model) == sample(copy) == before


@pytest.mark.parametrize("number", range(3))
def test_any_tensors_numbers_count(model, number):
    """Even with size and time of the file as they were."""
    file, before = model / "model.safetensors", sample(model)
    times, tensors = file.stat(), load_file(file)
    name = sorted(tensors)[number * (len(tensors) - 1) // 2]
    tensors[name] = tensors[name] + torch.randn_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size and sample(model) != before


def test_a_tensor_of_no_bytes_hides_no_other(model):
    """Of a larger dtype it is stored first, where the first of the others begins."""
    file = model / "model.safetensors"
    tensors = {**load_file(file), "zzz": torch.zeros(0, dtype=torch.float32)}
    save_file(tensors, file, metadata={"format": "pt"})
    before, name = sample(model), min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})
    assert sample(model) != before
