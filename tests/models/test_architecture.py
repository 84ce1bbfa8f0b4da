"""What mergekit plans for a checkpoint: its definition where that fits, else something that loses nothing."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.tiny_checkpoints import FAMILIES, LAYERS, save_tiny
from tests.tiny_mixtures import save_mixtures
from utils.models.architecture import plan_architecture
from utils.models.opening import open_checkpoint
from utils.models.planned_tensors import ADJUSTED, DEFINITION, INFERENCE, STORED


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Build the base and an expert of a family once."""
    built = {}

    def get(family):
        if family not in built:
            folder = tmp_path_factory.mktemp(family)
            built[family] = [
                open_checkpoint(str(save_tiny(family, folder / name, seed)))
                for seed, name in enumerate(("base", "expert"))
            ]
        return built[family]

    return get


def _rewritten(source, folder, change):
    """A copy of a checkpoint whose tensors went through `change`."""
    folder.mkdir()
    (folder / "config.json").write_text((source.folder / "config.json").read_text())
    save_file(change(load_file(source.folder / "model.safetensors")), folder / "model.safetensors")
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_is_planned_under_its_own_name(pair, family):
    base, expert = pair(family)
    plan = plan_architecture(base, [expert])
    assert {tensor.name for tensor in plan.tensors} == set(base.tensors)
    assert len(plan.tensors) == len(base.tensors)
    assert not any(plan.dropped.values()) and not any(plan.missing.values())
    assert all(plan.spellings[name] == name for name in base.tensors)


@pytest.mark.parametrize(
    ("family", "origin"),
    [
        ("llama", DEFINITION),
        ("qwen2", DEFINITION),
        ("gpt2", DEFINITION),
        ("gpt_neox", ADJUSTED),
        ("phi3_tied", ADJUSTED),
        ("llama_bias", INFERENCE),
    ],
)
def test_the_origin_and_its_reason_are_said(pair, family, origin):
    base, expert = pair(family)
    plan = plan_architecture(base, [expert])
    assert plan.origin == origin
    assert bool(plan.reason) == (origin != DEFINITION)


def test_embeddings_and_head_are_known_as_such(pair):
    base, _ = pair("gpt_neox")
    axes = {tensor.name: tensor.vocabulary_axis for tensor in plan_architecture(base).tensors}
    assert axes["embed_out.weight"] == 0 and axes["gpt_neox.embed_in.weight"] == 0
    assert sum(axis is not None for axis in axes.values()) == 2


def test_aliases_and_old_buffers_of_the_hubs_gpt2(pair, tmp_path):
    base, _ = pair("gpt2")
    old = _rewritten(
        base,
        tmp_path / "old",
        lambda tensors: {
            **{name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
            "h.0.attn.bias": tensors["transformer.wpe.weight"].clone(),
        },
    )
    plan = plan_architecture(old)
    assert plan.origin == STORED
    assert plan.spellings["transformer.h.1.mlp.c_fc.weight"] == "h.1.mlp.c_fc.weight"
    assert {tensor.name for tensor in plan.tensors} == set(old.tensors)  # also a mask that the model no longer has
    both = plan_architecture(base, [old])
    assert {tensor.name for tensor in both.tensors} == set(base.tensors)
    assert both.dropped[old.folder] == ("h.0.attn.bias",)  # which the base does not have


def test_a_missing_weight_is_an_error_that_names_it(pair, tmp_path):
    base, expert = pair("llama")
    name = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    broken = _rewritten(
        expert, tmp_path / "broken", lambda tensors: {key: value for key, value in tensors.items() if key != name}
    )
    with refused("model-incomplete"):
        plan_architecture(base, [broken])


def test_a_weight_missing_from_every_model_is_not_taken_for_optional(pair, tmp_path):
    base, _ = pair("gpt_neox")
    broken = _rewritten(
        base,
        tmp_path / "broken",
        lambda tensors: {key: value for key, value in tensors.items() if "dense_h_to_4h.weight" not in key},
    )
    with refused("model-incomplete"):
        plan_architecture(broken)


def test_different_architectures_are_refused_unless_allowed(pair):
    base, other = pair("llama")[0], pair("qwen2")[1]
    with refused("model-architectures-differ"):
        plan_architecture(base, [other])
    plan_architecture(base, [pair("mistral")[1]], allow_mixed=True)


def test_a_config_that_needs_code_says_so(pair, tmp_path):
    base, _ = pair("llama")
    broken = _rewritten(base, tmp_path / "own", dict)
    config = json.loads((broken.folder / "config.json").read_text())
    config |= {"model_type": "made_up", "architectures": ["MadeUpForCausalLM"]}
    (broken.folder / "config.json").write_text(json.dumps(config))
    with refused("model-config-unreadable"):
        plan_architecture(open_checkpoint(str(broken.folder)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_hidden_layers": "many"}, "model-config-value"),
        ({"model_type": 5}, "model-config-value"),
        ({"rope_parameters": 3}, "model-config-unreadable"),
    ],
)
def test_a_malformed_config_is_an_error_not_a_traceback(pair, tmp_path, change, code):
    broken = _rewritten(pair("llama")[0], tmp_path / "odd", dict)
    config = json.loads((broken.folder / "config.json").read_text())
    (broken.folder / "config.json").write_text(json.dumps(config | change))
    with refused(code):
        plan_architecture(open_checkpoint(str(broken.folder)))


def test_a_mixture_stored_apart_is_not_inferred_from_all_its_names(tmp_path, monkeypatch):
    """mergekit's inference goes through all names for each tensor of the class: minutes with thousands of experts."""
    from utils import mergekit_api

    folder = save_mixtures(tmp_path, num_hidden_layers=2)
    monkeypatch.setattr(mergekit_api, "infer_architecture_info", lambda *_: pytest.fail("inferred"))
    plan = plan_architecture(open_checkpoint(str(folder / "base")))
    assert plan.origin == STORED and "in another form than they are stored in" in plan.reason
