"""What the measured tensors are called: as norms.csv recorded, as in the checkpoint, or as the released code assumes."""

from types import SimpleNamespace

import pandas as pd
import pytest

from tests.refusals import refused
from tests.tiny_checkpoints import LAYERS, save_tiny
from utils.guidance.lewis.naming import assumed_names, found_names, measured_names, name_tensors
from utils.guidance.lewis.tables import NORM_TABLE
from utils.models.architecture import plan_architecture
from utils.models.opening import open_checkpoint
from utils.recipes.filters import NamedTensor, planned_tensors


def matrices(*names):
    return [NamedTensor(name, 2, 4) for name in names]


def test_short_component_names_and_prefix_mapping_find_the_same(tmp_path):
    base = open_checkpoint(str(save_tiny("llama", tmp_path)))
    tensors = planned_tensors(plan_architecture(base), base)
    short = found_names(tensors, LAYERS, ["q_proj"], {}, "model")
    mapped = found_names(tensors, LAYERS, ["query"], {"query": "self_attn.q_proj"}, "model")
    assert list(short.values()) == list(mapped.values())
    assert list(short.values()) == list(assumed_names(LAYERS, ["q_proj"], {"q_proj": "self_attn.q_proj"}).values())


def test_an_ambiguous_component_lists_its_candidates():
    tensors = matrices("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight")
    with refused("component-ambiguous") as caught:
        found_names(tensors, 1, ["c_proj"], {}, "model")
    assert "transformer.h.*.attn.c_proj, transformer.h.*.mlp.c_proj" in str(caught.value)
    assert found_names(tensors, 1, ["mlp.c_proj"], {}, "model") == {(0, "mlp.c_proj"): tensors[1].name}


def test_a_component_that_is_not_there_lists_what_is():
    with refused("component-unknown") as caught:
        found_names(matrices("a.0.q_proj.weight"), 1, ["q_porj"], {}, "model")
    said = str(caught.value)
    assert "'q_porj'" in said and "a.*.q_proj" in said and "prefix_mapping" in said


def test_a_component_must_be_in_every_layer():
    with refused("table-row-missing") as caught:
        found_names(matrices("a.0.q.weight"), 2, ["q"], {}, "model")
    assert "the delta tables have 2 rows, the model has a.*.q in 1 layers" in str(caught.value)


def test_recorded_names_and_sizes():
    norms = NORM_TABLE.frame([("base", 0, "q", "a.0.q.weight", 1.0, 6), ("x", 0, "q", "a.0.q.weight", 2.0, 6)])
    assert measured_names(norms, "base", 1, ["q"]) == ({(0, "q"): "a.0.q.weight"}, {"a.0.q.weight": 6})


def test_a_base_that_was_measured_on_several_texts_is_named_once():
    rows = [("base", 0, "q", "a.0.q.weight", 1.0, 6)] * 2
    norms = NORM_TABLE.frame(rows).assign(text=["code", "math"])
    assert measured_names(norms, "base", 1, ["q"]) == ({(0, "q"): "a.0.q.weight"}, {"a.0.q.weight": 6})


@pytest.mark.parametrize("layer", [0, 1])
def test_a_recorded_name_that_is_missing(layer):
    norms = NORM_TABLE.frame([("base", layer, "q", "a.q.weight", 1.0, 6)])
    with refused("table-row-missing") as caught:
        measured_names(norms, "base", 2, ["q"])
    assert f"norms.csv, rows of 'base': layer {1 - layer}, component q is missing" in str(caught.value)


def test_without_the_base_two_towers_whose_names_end_alike_get_their_own():
    """Both are measured; the language tower's filter alone would hit the other's tensors, too."""
    rows = [("base", 0, "wo", "layers.0.wo.weight", 1.0, 6), ("base", 0, "vision", "vision.layers.0.wo.weight", 1.0, 6)]
    deltas = {"math": pd.DataFrame({"wo": [0.1], "vision": [0.2]})}
    measured = SimpleNamespace(deltas=deltas, norms=NORM_TABLE.frame(rows))
    found = name_tensors(SimpleNamespace(base_model_type="base", prefix_mapping={}), measured, None)
    assert list(found.filters.values()) == ["vision.layers.0.wo", "layers.0.wo."] and found.before == ()
