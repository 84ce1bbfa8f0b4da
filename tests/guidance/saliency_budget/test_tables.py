"""Reading the saliency budget's tables: what is there comes back in order, what is wrong is told in one message."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.refusals import refused
from utils.errors import UserError
from utils.guidance.csv_files import csv_bytes
from utils.guidance.saliency_budget.bins import BINS
from utils.guidance.saliency_budget.method import HISTOGRAM, TENSORS, vector_file
from utils.guidance.saliency_budget.tables import (
    HISTOGRAM_TABLE,
    TENSOR_TABLE,
    read_power,
    read_saliency,
    read_vector_file,
    read_vectors_of,
)
from utils.recipes.saliency_vectors import FORMAT, vector_file_bytes

EXPERTS = ("code", "math")
PARTS = {"q": 30, "up": 50}


def config(components=None, experts=EXPERTS):
    return SimpleNamespace(experts=[SimpleNamespace(type=name) for name in experts], components=components)


def tables():
    """Two experts, two layers, two components; rows by layer."""
    tensors, bins = [], []
    for model in EXPERTS:
        for layer in range(2):
            for component, params in PARTS.items():
                name = f"layers.{layer}.{component}.weight"
                tensors.append((model, layer, component, name, params, params - 1, 3, 0.5, 0.7))
                bins += [(model, name, 100 + layer, 20), (model, name, 200, params - 23)]
    rows = {TENSORS: tensors, HISTOGRAM: bins}
    return {form.file: form.frame(rows[form.file]) for form in (TENSOR_TABLE, HISTOGRAM_TABLE)}


def saved(folder, frames):
    for name, frame in frames.items():
        (folder / name).write_bytes(csv_bytes(frame))
    return folder


def codes_of(folder, frames, components=None, experts=EXPERTS):
    with pytest.raises(UserError) as caught:
        read_saliency(saved(folder, frames), experts, config(components))
    return set(caught.value.codes)


def test_histograms_come_back_by_component_then_layer(tmp_path):
    found = read_saliency(saved(tmp_path, tables()), ["math"], config(["up", "q"]))
    assert list(found) == ["math"]
    one = found["math"]
    assert list(zip(one.tensors["component"], one.tensors["layer"], strict=True)) == [
        ("q", 0), ("q", 1), ("up", 0), ("up", 1)
    ]  # fmt: skip
    assert one.zeros.tolist() == [3] * 4 and one.counts.shape == (4, BINS)
    assert one.counts.sum(axis=1).tolist() == [27, 27, 47, 47]
    assert one.counts[0, 100] == one.counts[1, 101] == 20 and one.counts[3, 200] == 27


@pytest.mark.parametrize("equal", [EXPERTS, EXPERTS[:1]])
def test_experts_equal_to_the_base_have_no_bins(tmp_path, equal):
    frames = tables()
    none = frames[TENSORS]["model"].isin(equal)
    frames[TENSORS].loc[none, "zeros"] = frames[TENSORS].loc[none, "params"]
    frames[HISTOGRAM] = frames[HISTOGRAM][~frames[HISTOGRAM]["model"].isin(equal)]
    found = read_saliency(saved(tmp_path, frames), EXPERTS, config())
    assert [one.counts.sum() > 0 for one in found.values()] == [name not in equal for name in EXPERTS]
    assert found["code"].zeros.tolist() == [30, 30, 50, 50]


def test_types_may_look_like_numbers(tmp_path):
    frames = {name: frame.assign(model=frame["model"].map({"code": 1, "math": 2})) for name, frame in tables().items()}
    assert list(read_saliency(saved(tmp_path, frames), ["2"], config(experts=("1", "2")))) == ["2"]


@pytest.mark.parametrize("name", [TENSORS, HISTOGRAM])
@pytest.mark.parametrize("row", [0, 3, -1])
def test_a_row_that_is_missing(tmp_path, name, row):
    frames = tables()
    frames[name] = frames[name].drop(frames[name].index[row])
    assert codes_of(tmp_path, frames) <= {"table-row-missing", "table-row-unexpected"}


@pytest.mark.parametrize(
    ("name", "column", "value", "codes"),
    [
        (TENSORS, "layer", 0.5, "table-bad-value"),
        (TENSORS, "params", float("nan"), "table-bad-value"),
        (TENSORS, "params", 0, "table-bad-value"),
        (TENSORS, "zeros", -1, "table-bad-value"),
        (TENSORS, "zeros", 4, "table-row-missing"),
        (TENSORS, "model", "maths", "table-unknown-expert"),
        (TENSORS, "component", "k", "dataframes-other-config"),
        (TENSORS, "tensor", "layers.1.up.weight", "table-row-twice"),
        (HISTOGRAM, "bin", BINS, "table-bad-value"),
        (HISTOGRAM, "bin", float("inf"), "table-bad-value"),
        (HISTOGRAM, "bin", 200, "table-row-twice"),
        (HISTOGRAM, "count", 0, "table-bad-value"),
        (HISTOGRAM, "count", "many", "table-bad-value"),
        (HISTOGRAM, "model", "maths", "table-unknown-expert"),
        (HISTOGRAM, "tensor", "layers.7.q.weight", "table-row-unexpected"),
    ],
)
def test_a_value_that_is_wrong(tmp_path, name, column, value, codes):
    frames = {key: frame.astype(object) for key, frame in tables().items()}
    frames[name].loc[0, column] = value
    assert codes in codes_of(tmp_path, frames)


def test_histograms_that_do_not_add_up_say_what_is_missing(tmp_path):
    frames = tables()
    frames[HISTOGRAM] = frames[HISTOGRAM].drop(index=0)
    with refused("table-row-missing") as caught:
        read_saliency(saved(tmp_path, frames), EXPERTS, config())
    said = str(caught.value)
    assert "model code: layers.0.q.weight has 7 entries in bins and 3 without saliency, but 30 params" in said


def test_other_components_than_the_configs(tmp_path):
    assert codes_of(tmp_path, tables(), ["q", "o"]) == {"dataframes-other-config"}


def test_an_expert_that_was_not_measured(tmp_path):
    frames = {name: frame[frame["model"] == "code"] for name, frame in tables().items()}
    assert codes_of(tmp_path, frames) == {"table-row-missing"}


def test_experts_measured_on_different_tensors(tmp_path):
    frames = tables()
    for name in frames:
        frames[name] = frames[name][(frames[name]["model"] == "code") | ~frames[name]["tensor"].str.contains("1.")]
    assert codes_of(tmp_path, frames) == {"dataframes-other-config"}


def test_vectors_come_back_under_their_new_names(tmp_path):
    vectors = {name: (torch.rand(3), torch.rand(4)) for name in ("a.weight", "b.weight")}
    (tmp_path / vector_file("code")).write_bytes(vector_file_bytes(vectors))
    found = read_vectors_of(tmp_path, "code", {"a.weight": "x.weight"}, 0.5)
    assert list(found) == ["x.weight"]
    for one, two in zip(found["x.weight"], vectors["a.weight"], strict=True):
        torch.testing.assert_close(one, two.double().sqrt())
    with refused("vectors-lack-tensor"):
        read_vectors_of(tmp_path, "code", {"c.weight": "c.weight"}, 1)
    with refused("vectors-missing"):
        read_vectors_of(tmp_path, "math", {}, 1)


def test_a_file_of_vectors_is_handed_on_as_it_is(tmp_path):
    content = vector_file_bytes({"a.weight": (torch.rand(3), torch.rand(4)), "norm.weight": (torch.rand(4),)})
    path = tmp_path / vector_file("code")
    path.write_bytes(content)
    assert read_vector_file(tmp_path, "code", ["a.weight"]) == content
    with refused("vectors-lack-tensor"):
        read_vector_file(tmp_path, "code", ["c.weight"])
    save_file({"a.axis0": torch.ones(3), "b.axis0": -torch.ones(3)}, path, metadata={"format": FORMAT})
    with refused("vectors-not-finite"):
        read_vector_file(tmp_path, "code", ["a"])


def test_the_exponent_comes_from_the_manifest():
    for manifest in (None, {}, {"guidance_options": None}, {"guidance_options": {"gradient_at": "base"}}):
        assert read_power(manifest) == 1
    assert read_power({"guidance_options": {"saliency_power": 0.25}}) == 0.25
    for value in (0, -1, 1.5, "0.5", True, None, float("nan")):
        with refused("manifest-value"):
            read_power({"guidance_options": {"saliency_power": value}})
