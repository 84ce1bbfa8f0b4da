"""The file of saliency vectors: what goes in comes out, and every wrong file is named."""

import contextlib
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from utils.recipes.saliency_vectors import FORMAT, VectorKey, open_vectors, read_vectors, vector_file_bytes

NAME = "model.layers.0.mlp.up_proj.weight"


def write(path: Path, tensors: dict, form: str | None = FORMAT) -> Path:
    """A safetensors file as somebody else might write it."""
    save_file(tensors, path, metadata=None if form is None else {"format": form})
    return path


def pair(a: int = 3, b: int = 4) -> dict[str, torch.Tensor]:
    return {f"{NAME}.axis0": torch.rand(a), f"{NAME}.axis1": torch.rand(b)}


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.text("abc.0_", min_size=1), st.lists(st.integers(0, 5), min_size=1, max_size=2).map(tuple), max_size=4
    )
)
def test_vectors_come_back_as_they_were(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    vectors = {name: tuple(torch.rand(n) * 1e-12 for n in shape) for name, shape in shapes.items()}
    path.write_bytes(vector_file_bytes(vectors))
    opened = open_vectors(path)
    assert opened.of_these(["absent", *vectors]) == list(vectors)
    opened.check_all()
    assert opened.keys == {f"{name}.axis{place}" for name in vectors for place in range(len(vectors[name]))}
    for name, expected in vectors.items():
        assert name in opened and opened.shape(name) == shapes[name]
        for found, axis in zip(opened.vectors(name), expected, strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, axis)


def test_the_file_is_plain_safetensors(tmp_path):
    path = tmp_path / "v.safetensors"
    path.write_bytes(vector_file_bytes({NAME: (torch.tensor([1.0, 2]), torch.tensor([3.0]))}))
    assert {key: value.tolist() for key, value in load_file(path).items()} == {
        f"{NAME}.axis0": [1, 2],
        f"{NAME}.axis1": [3],
    }
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "lewis saliency 1"}


def test_the_same_vectors_give_the_same_bytes():
    names = [f"layers.{i}.weight" for i in range(20)]
    vectors = {name: (torch.rand(5), torch.rand(7)) for name in names}
    backwards = {name: vectors[name] for name in reversed(names)}
    assert len({vector_file_bytes(vectors), vector_file_bytes(backwards), vector_file_bytes(vectors)}) == 1


def test_other_dtypes_are_saved_in_float32(tmp_path):
    path = tmp_path / "v.safetensors"
    axes = torch.rand(3, dtype=torch.float64), torch.rand(8, dtype=torch.bfloat16)[::2]
    path.write_bytes(vector_file_bytes({NAME: axes}))
    assert all(
        torch.equal(found, axis.float()) for found, axis in zip(open_vectors(path).vectors(NAME), axes, strict=True)
    )


@pytest.mark.parametrize(
    "axis", [torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.ones(2, 2), torch.tensor(1.0)]
)
def test_what_is_no_vector_of_squares_is_not_written(axis):
    with pytest.raises(ValueError, match="axis1"):
        vector_file_bytes({NAME: (torch.ones(2), axis)})
    for axes in ((), (torch.ones(2),) * 3):
        with pytest.raises(ValueError, match=f"has {len(axes)} vectors"):
            vector_file_bytes({NAME: axes})
    with pytest.raises(ValueError, match="axis0"):  # finite in float64, not in what is saved
        vector_file_bytes({NAME: (torch.tensor([1e60], dtype=torch.float64), torch.ones(2))})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "vectors-missing"),
        (lambda path: path.mkdir(), "vectors-missing"),
        (lambda path: path.write_bytes(b""), "vectors-malformed"),
        (lambda path: path.write_bytes(b"x" * 200), "vectors-malformed"),
        (lambda path: path.write_bytes(vector_file_bytes({NAME: (torch.ones(9), torch.ones(9))})[:-1]), "vectors-malformed"),
        (lambda path: write(path, pair(), None), "vectors-of-other-format"),
        (lambda path: write(path, pair(), "pt"), "vectors-of-other-format"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_opened(tmp_path, make, code):
    path = tmp_path / "v.safetensors"
    make(path)
    with refused(code, str(path)):
        open_vectors(path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{NAME}.axis0": None}, "vectors-lack-tensor"),
        ({f"{NAME}.axis0": torch.ones(3, 1)}, "vectors-malformed"),
        ({f"{NAME}.axis0": torch.ones(3, dtype=torch.float16)}, "vectors-malformed"),
        ({f"{NAME}.axis1": torch.tensor([1.0, -1e-30, 1, 1])}, "vectors-not-finite"),
        ({f"{NAME}.axis1": torch.tensor([1.0, float("nan"), 1, 1])}, "vectors-not-finite"),
        ({f"{NAME}.axis0": torch.tensor([1.0, float("inf"), 1])}, "vectors-not-finite"),
    ],
)
def test_vectors_that_cannot_be_used(tmp_path, change, code):
    content = {key: value for key, value in {**pair(), **change}.items() if value is not None}
    path = write(tmp_path / "v.safetensors", content)
    with refused(code, next(iter(change))):
        open_vectors(path).vectors(NAME)
    if f"{NAME}.axis0" in content:  # what is there is looked at, whoever asks
        with refused(code):
            open_vectors(path).check_all()


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "v.safetensors"
    for value in (1.0, 2.0):
        other = tmp_path / "new"
        other.write_bytes(vector_file_bytes({NAME: (torch.full((2,), value), torch.ones(2))}))
        other.replace(path)
        assert read_vectors(VectorKey(path, NAME))[0].tolist() == [value, value]
    path.unlink()
    with refused("vectors-missing"):
        read_vectors(VectorKey(path, NAME))


def test_the_package_is_light():
    probe = "import sys, utils.recipes.saliency_vectors; print({'torch', 'numpy', 'mergekit'} & set(sys.modules) or 'light')"
    done = subprocess.run([sys.executable, "-c", probe], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "light", done.stderr


def test_the_same_vectors_and_exponent_always_give_the_same_bytes(tmp_path):
    vectors = {"a.weight": (torch.rand(3), torch.rand(4)), "b.weight": (torch.rand(2),)}
    contents = {vector_file_bytes(vectors, 0.5) for _ in range(20)}
    assert len(contents) == 1
    (tmp_path / "file").write_bytes(contents.pop())
    opened = open_vectors(tmp_path / "file")
    assert all(torch.equal(a, b) for a, b in zip(opened.vectors("a.weight"), vectors["a.weight"], strict=True))
    assert opened.power == 0.5


def test_a_file_that_is_there_is_not_called_missing(tmp_path):
    """safetensors says "No such file" where the process has too many files open."""
    save_file({"x.axis0": torch.ones(2)}, tmp_path / "vectors.safetensors", {"format": FORMAT})
    before, soft = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]  # so that the lowest free number is behind all
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, *taken) + 1, soft[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with refused("vectors-unreadable", "it is there"):
            open_vectors(tmp_path / "vectors.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
        for descriptor in taken:
            os.close(descriptor)
