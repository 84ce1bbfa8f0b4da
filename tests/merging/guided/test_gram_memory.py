"""What gram_mean says it takes, against the bytes that are alive while it merges a tensor.

python -m pytest tests/merging/guided/test_gram_memory.py
"""

import pytest
import torch

from tests.selected import few
from utils.mergekit_api import TensorGroup
from utils.merging.allocations import LiveBytes
from utils.merging.guided.gram_method import GramMean
from utils.recipes.gram_file import GramFileWriter

SHARED = {
    "lambda": 1.0,
    "ridge": 1e-7,
    "off_diagonal": 1.0,
    "embedding_rows": True,
    "power": 0.5,
    "floor": 0.1,
    "refit_ridge": 1e-3,
    "low_rank": False,
    "joint_support": False,
    "anchor": True,
}


def write_matrices(path, kind, shape):
    with GramFileWriter(path, ["w"]) as file:
        file.add_axes("w", tuple(torch.rand(length) + 0.1 for length in shape))
        tokens = torch.randn(2 * shape[-1], shape[-1]) if kind != "guided" else None
        if kind == "linear":
            file.add_inputs("w", 1, tokens.t() @ tokens / len(tokens))
        elif kind == "rows":
            file.add_rows("w", tokens.t() @ tokens)
    return str(path)


SHAPES = [
    ("linear", (512, 512)),
    ("linear", (4096, 256)),
    ("linear", (128, 768)),
    ("rows", (8000, 64)),
    ("rows", (8000, 288)),
    ("guided", (2**20,)),
]


@pytest.mark.parametrize(
    ("kind", "shape", "models"),
    few(
        [(*one, models) for one in SHAPES for models in (1, 2, 3)],
        *((*one, 2) for one in SHAPES),
        ("linear", (512, 512), 1),
        ("linear", (512, 512), 3),
    ),
)
def test_what_is_said_is_what_is_taken(tmp_path, kind, shape, models):
    said, taken = said_and_taken(tmp_path, kind, shape, models)
    if models == 1:  # is taken as it is
        assert taken <= said
    else:
        assert 0.8 < said / taken < 1.25


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("shape", "models", "density"),
    few(
        [(shape, models, density) for _, shape in SHAPES[:3] for models in (1, 2) for density in (0.1, 0.5)],
        ((512, 512), 1, 0.1),
        ((128, 768), 2, 0.1),
    ),
)
def test_of_a_change_that_is_cut(tmp_path, shape, models, density, joint):
    said, taken = said_and_taken(tmp_path, "linear", shape, models, density, joint)
    assert 0.75 < said / taken < 1.6  # how many entries a row keeps depends on them


def said_and_taken(folder, kind, shape, models, density=1.0, joint=False):
    torch.manual_seed(0)
    files = {number: write_matrices(folder / f"{number}.safetensors", kind, shape) for number in range(1, models + 1)}
    tensors = [torch.randn(shape).to(torch.bfloat16) for _ in range(models + 1)]
    each = {"weight": 1.0, "density": density, "factor": 1.0}
    parameters = {name: dict.fromkeys(files, value) for name, value in each.items()} | SHARED
    group = TensorGroup.from_tensors(tensors, base_index=0, name="w")
    with LiveBytes(tensors) as counted, torch.no_grad():
        GramMean().merge_group(group, **(parameters | {"joint_support": joint}), saliency=files)
    return GramMean.arithmetic_bytes(shape, models, is_vocabulary=kind == "rows", density=density), counted.peak
