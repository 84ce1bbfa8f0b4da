"""What tensors are called in a merge, and which of them nothing was measured of.

python -m pytest tests/recipes/test_naming.py
"""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from mergekit.config import InputModelDefinition, evaluate_setting
from transformers import AutoConfig, AutoModelForCausalLM

from utils.models.opening import open_checkpoint
from utils.models.planned_tensors import ArchitecturePlan, PlannedTensor
from utils.pair.config import ModelEntry
from utils.recipes.coefficients import COLUMNS
from utils.recipes.filters import NamedTensor
from utils.recipes.method_rules import OWN_METHODS
from utils.recipes.naming import LocalModels, Naming, WrittenTensors, filters_without_vectors
from utils.recipes.recipe import RecipeSettings, recipe, renamed_files
from utils.recipes.saliency_vectors import open_vectors, vector_file_bytes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def base(tmp_path):
    """A model whose checkpoint stores buffers beside its parameters, in every block."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("apertus", **SIZES))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_stored_buffers_are_those_without_vectors(base, tmp_path):
    parameters = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    ones = {name: tuple(torch.ones(length) for length in value.shape) for name, value in parameters.items()}
    (tmp_path / "file").write_bytes(vector_file_bytes(ones))
    written = LocalModels(ModelEntry(name=str(base), type="base"), []).written
    found = filters_without_vectors(written, [open_vectors(tmp_path / "file")]).filters
    buffers = [name for name in open_checkpoint(str(base)).tensors if name not in parameters]
    assert len(buffers) >= 4 and sorted(found) == sorted(buffers)
    for text in found:
        assert [name for name in written.names if text in name] == [text]


def test_files_are_renamed_under_filters_too():
    saliency = [{"filter": "act_fn.beta", "value": ""}, {"value": "a"}]
    assert renamed_files(saliency, str.upper) == [{"filter": "act_fn.beta", "value": ""}, {"value": "A"}]
    assert renamed_files("a", str.upper) == "A" and renamed_files("", str.upper) == ""


def test_what_was_measured_keeps_its_file_though_its_name_ends_as_an_unmeasured_ones_does(tmp_path):
    measured = ["vision.layers.0.norm.weight", "layers.0.up.weight"]
    names = [*measured, "layers.0.norm.weight", "layers.0.beta"]
    (tmp_path / "file").write_bytes(vector_file_bytes({name: (torch.ones(2),) for name in measured}))
    tensors = tuple(PlannedTensor(name) for name in names)
    plan = ArchitecturePlan("", "", tensors, {}, {}, {name: name for name in names}, info=None)
    base = SimpleNamespace(name="base", tensors=dict.fromkeys(names))
    written = WrittenTensors(base, plan, tuple(NamedTensor(name, 1, 2) for name in names))
    unmeasured = filters_without_vectors(written, [open_vectors(tmp_path / "file")])
    entries = (ModelEntry("base", "base"), ModelEntry("math", "math"))
    method = OWN_METHODS["gram_mean"]
    settings = RecipeSettings(method, entries[0], entries[1:], {}, saliency={"math": "file"}, unmeasured=unmeasured)
    data = recipe(pd.DataFrame(columns=list(COLUMNS)), Naming({}, {}, {}, None, ""), settings)
    entry = InputModelDefinition.model_validate(data["models"][1])
    found = {name: evaluate_setting(name, entry.parameters["saliency"], validate=str) for name in names}
    assert found == {name: "file" if name in measured else "" for name in names}
