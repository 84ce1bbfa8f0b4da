"""What is known before weights are read is said before weights are read, and nothing is written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands_here import run_here
from tests.measured_merge import estimated_and_measured
from tests.refusals import refused
from tests.tiny_checkpoints import edit_tensors, save_tiny
from tests.tiny_merges import (
    assert_refused,
    assert_same_tensors,
    merge_here,
    merge_stock,
    recipe,
    save_models,
    tensors,
    write_recipe,
)
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import contents, edit_json
from utils.merging import planning

# --- the models -------------------------------------------------------------------------------------------------------


def test_a_missing_tensor(copies, no_weights):
    data = recipe(copies)
    edit_tensors(copies / "math", lambda found: found.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(copies, data, "model-incomplete", "mlp.up_proj.weight")


def test_a_different_shape(copies, no_weights):
    edit_tensors(copies / "code", lambda found: found.update({"model.norm.weight": torch.ones(31)}))
    assert_refused(copies, recipe(copies), "merge-shapes", "model.norm.weight has different shapes")


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_a_tensor_that_only_an_expert_has_is_left_out(copies, capsys, method):
    data = recipe(copies, method)
    expected = merge_here(copies, data, "expected")
    names = ("model.mtp.weight", "model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.q_proj.bias")
    edit_tensors(copies / "code", lambda found: found.update({name: torch.ones(3) for name in names}))
    capsys.readouterr()
    assert_same_tensors(merge_here(copies, data), expected)
    assert (
        "code has tensors that are left out, since the model class reads none of them (3): " in capsys.readouterr().err
    )


def test_a_tensor_that_only_the_base_has_is_kept(copies):
    edit_tensors(copies / "base", lambda found: found.update({"model.mtp.weight": torch.ones(3)}))
    assert torch.equal(tensors(merge_here(copies, recipe(copies)))["model.mtp.weight"], torch.ones(3).bfloat16())


def test_a_base_that_transformers_itself_does_not_load(tmp_path, no_weights):
    """shieldgemma2: what the class saves has no language tower for the class that its config then names."""
    folder = save_mixtures(tmp_path, "shieldgemma2", "image-text")
    data = recipe(folder, "task_arithmetic")
    assert_refused(folder, data, "model-unloadable", "transformers finds no weights for")


def test_a_base_whose_config_is_of_other_shapes(copies, no_weights):
    edit_json(copies / "base/config.json", intermediate_size=64)
    for expert in ("math", "code"):
        shutil.copy(copies / "base/config.json", copies / expert / "config.json")
    assert_refused(copies, recipe(copies), "model-shape", "than config.json makes them")


def test_a_plan_that_passes_over_a_tensor(copies, no_weights, monkeypatch):
    """The proof does not rest on plan_architecture alone."""
    plan = planning.plan_merge

    def forgetful(*arguments):
        made = plan(*arguments)
        return replace(made, tensors=made.tensors[1:])

    monkeypatch.setattr(planning, "plan_merge", forgetful)
    assert_refused(copies, recipe(copies), "merge-left-out", "the merge would leave out model.embed_tokens.weight")


def test_different_depths(copies, no_weights):
    shutil.rmtree(copies / "math")
    save_tiny("llama", copies / "math", layers=4)
    assert_refused(copies, recipe(copies), "merge-depths", "math has 4 layers")


def test_different_architectures_need_a_flag(copies):
    shutil.rmtree(copies / "math")
    save_tiny("mistral", copies / "math", seed=5)
    assert_refused(copies, recipe(copies), "model-architectures-differ", "MistralForCausalLM")
    # these two models have changes of equal magnitude, which exact selection resolves by its own rule
    assert_same_tensors(
        merge_here(copies, recipe(copies), allow_crimes=True, fast_selection=False),
        merge_stock(copies, recipe(copies), allow_crimes=True),
    )


def test_configs_that_differ_are_said(copies, capsys):
    edit_json(copies / "math" / "config.json", rope_theta=5.0, rms_norm_eps=1e-5)
    merge_here(copies, recipe(copies), dry_run=True)
    errors = capsys.readouterr().err
    assert "config.json of base and math differ in" in errors and "rms_norm_eps 1e-06 and 1e-05" in errors


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda copies: shutil.rmtree(copies / "math"), "model-missing"),
        (lambda copies: (copies / "math" / "config.json").unlink(), "model-no-config"),
        (lambda copies: (copies / "math" / "config.json").write_text("{"), "json-invalid"),
        (lambda copies: edit_json(copies / "math" / "config.json", architectures=None), "model-no-architecture"),
        (
            lambda copies: edit_json(copies / "math" / "config.json", quantization_config={"quant_method": "gptq"}),
            "model-quantized",
        ),
        (lambda copies: edit_json(copies / "math" / "config.json", is_encoder_decoder=True), "model-encoder-decoder"),
        (lambda copies: (copies / "math" / "model.safetensors").unlink(), "model-no-weights"),
        (lambda copies: (copies / "math" / "model.safetensors").write_bytes(b"x" * 100), "weights-truncated"),
        (lambda copies: (copies / "math" / "model.safetensors.index.json").write_text("{}"), "model-two-weights"),
        (lambda copies: _cut(copies / "math" / "model.safetensors"), "weights-truncated"),
    ],
)
def test_malformed_models(copies, spoil, code, no_weights):
    spoil(copies)
    assert_refused(copies, recipe(copies), code)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_one_model_spelled_twice(copies, monkeypatch):
    """mergekit takes two spellings of one folder for two models, and the base's second one for an expert."""
    monkeypatch.chdir(copies)
    data = recipe(Path(), experts=("code",))
    data["models"][0]["model"] = "./base/"
    data["base_model"] = str(copies / "base")
    assert_same_tensors(merge_here(copies, data), merge_stock(copies, recipe(copies, experts=("code",))))
    data["models"].append({"model": "./code", "parameters": {"weight": 1}})
    assert_refused(copies, data, "recipe-model-twice", "code and ./code are the same model", "again")
    assert_refused(copies, recipe(copies, experts=()), "recipe-only-base", output="again")


# --- names ------------------------------------------------------------------------------------------------------------


def test_plus_and_at_in_names_are_explained(copies, tmp_path):
    (copies / "code").rename(copies / "a+b")
    (copies / "math").rename(copies / "a@b")
    data = recipe(copies)
    data["models"][1]["model"] = str(copies / "a+b")
    data["models"][2]["model"] = str(copies / "a@b")
    assert_refused(copies, data, "adapter-folder-name", "write model:")
    data["models"][1]["model"] = {"model": {"path": str(copies / "a+b")}}
    assert_refused(copies, data, "model-missing")
    data["models"][2]["model"] = {"model": {"path": str(copies / "a@b")}}
    merged = merge_here(copies, data)
    (copies / "a+b").rename(copies / "code")
    (copies / "a@b").rename(copies / "math")
    assert_same_tensors(merged, merge_stock(copies, recipe(copies)))


def test_a_name_that_is_neither_here_nor_on_the_hub(copies):
    assert_refused(copies, recipe(Path("nowhere")), "hub-offline", "nowhere/base")


def test_override_architecture_is_refused(copies):
    data = recipe(copies)
    data["models"][1]["model"] = {"model": {"path": str(copies / "code")}, "override_architecture": "X"}
    assert_refused(copies, data, "recipe-override")


# --- parameters against the planned tensors ---------------------------------------------------------------------------


def test_a_filter_that_matches_nothing(copies, no_weights):
    data = recipe(copies)
    data["models"][1]["parameters"]["density"].insert(0, {"filter": "transformer.h.0.attn", "value": 0.2})
    assert_refused(
        copies, data, "recipe-idle-filter", "the filter 'transformer.h.0.attn' matches no tensor; tensors are"
    )


def test_a_filter_hidden_behind_another(copies, no_weights):
    data = recipe(copies)
    data["models"][2]["parameters"]["density"].append({"filter": "up_proj", "value": 0.2})
    assert_refused(copies, data, "recipe-idle-filter", "'up_proj' is hidden behind an earlier one")
    data = recipe(copies, parameters={"lambda": [{"value": 1.0}, {"filter": "down_proj", "value": 0.5}]})
    assert_refused(copies, data, "recipe-idle-filter", "parameters.lambda: the filter 'down_proj' is hidden")


def test_a_head_that_is_tied_is_no_tensor(tmp_path, request):
    save_models(tmp_path, names=("base", "code"), tie_word_embeddings=True)
    request.getfixturevalue("no_weights")  # only now: making the models reads them
    data = recipe(tmp_path, experts=("code",))
    data["models"][1]["parameters"]["density"].insert(0, {"filter": "lm_head", "value": 0.2})
    assert_refused(tmp_path, data, "recipe-idle-filter", "'lm_head' matches no tensor")


def test_della_values_that_would_stop_it_half_way(copies, no_weights):
    data = recipe(copies, "della")
    data["models"][1]["parameters"]["density"] = 0.9
    assert_refused(copies, data, "recipe-bad-value", "density 0.9 with epsilon 0.15; this method needs both")
    data["models"][1]["parameters"]["epsilon"] = 0.05
    merge_here(copies, data, dry_run=True)


def test_weights_that_cancel_are_said(copies, capsys):
    data = recipe(copies, experts=("code",))
    data["models"][1]["parameters"]["weight"] = [{"filter": "mlp", "value": 0.3}, {"value": 1}]
    merge_here(copies, data, dry_run=True)
    assert "the weights of code have no effect: with one expert, normalize: true divides" in capsys.readouterr().err
    merge_here(copies, {**data, "parameters": {"normalize": False}}, dry_run=True)
    assert "no effect" not in capsys.readouterr().err


def test_a_missing_weight(copies, no_weights):
    data = recipe(copies)
    del data["models"][1]["parameters"]["weight"]
    assert_refused(copies, data, "recipe-not-mergekits", "Missing required parameter weight")


# --- machine and output -----------------------------------------------------------------------------------------------


def test_devices_that_are_not_there(copies, no_weights):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for device in ("cuda", "cuda:1"):
        assert_refused(copies, recipe(copies), "device-missing", device=device)
    for device in ("mps", "tpu", "gpu"):
        assert_refused(copies, recipe(copies), "device-unknown", device=device)


def test_a_disk_that_is_too_small(copies, no_weights, monkeypatch):
    usage = shutil.disk_usage(copies)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert_refused(copies, recipe(copies), "disk-full", "the result needs 1.")


def test_outputs_that_would_hurt_an_input(copies, no_weights, monkeypatch):
    monkeypatch.chdir(copies)
    (copies / "link").symlink_to("code")
    for output, code in (
        ("code", "out-is-input"),
        ("link", "out-is-input"),
        ("code/merged", "out-in-input"),
        ("link/merged", "out-in-input"),
        (".", "out-holds-input"),
        ("merged.yaml", "out-is-file"),
    ):
        data = recipe(Path("."))
        write_recipe(copies / "merged.yaml", data)
        before = contents(copies)
        from utils.commands.merge import merge
        from utils.merging.settings import MergeSettings

        with refused(code):
            merge(MergeSettings(output_path=Path(output), merge_config=Path("merged.yaml"), device="cpu"))
        assert contents(copies) == before


def test_flags_without_effect_are_said(copies, capsys):
    merge_here(copies, recipe(copies), dry_run=True, lazy_unpickle=True, low_cpu_memory=True, write_threads=2)
    errors = capsys.readouterr().err
    for flag in ("--lazy_unpickle", "--low_cpu_memory", "--write_threads"):
        assert f"{flag} does nothing" in errors


def test_an_input_that_changes_meanwhile(copies, monkeypatch):
    from utils.merging import run as merge_run

    run = merge_run.run_merge

    def meanwhile(*arguments):
        run(*arguments)
        (copies / "code" / "model.safetensors").touch()

    monkeypatch.setattr(merge_run, "run_merge", meanwhile)
    write_recipe(copies / "merged.yaml", recipe(copies))
    with refused("merge-input-changed"):
        merge_here(copies, recipe(copies))
    assert not (copies / "merged").exists() and not list(copies.glob(".*"))


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_without_a_dtype_the_result_has_the_bases_tensor_by_tensor(copies, capsys):
    """mergekit would promote and save float32 if one expert is float32."""
    edit_tensors(copies / "base", lambda found: found.update({"model.norm.weight": found["model.norm.weight"].float()}))
    edit_tensors(copies / "code", lambda found: found.update({name: tensor.float() for name, tensor in found.items()}))
    merged = merge_here(copies, recipe(copies, dtype=None), quiet=False)
    assert "computed in the dtype of the inputs, saved in bfloat16" in capsys.readouterr().out
    for name, tensor in tensors(merged).items():
        assert tensor.dtype == (torch.float32 if name == "model.norm.weight" else torch.bfloat16), name


def test_a_head_that_only_an_expert_stores_is_said(tmp_path, capsys):
    save_models(tmp_path, names=("base",), tie_word_embeddings=True)
    save_models(tmp_path, names=("code",))
    merge_here(tmp_path, recipe(tmp_path, experts=("code",)))
    assert "lm_head.weight is stored by code but not by base; the result stores it, and transformers ignores it" in (
        capsys.readouterr().err
    )


def test_report_says_what_will_happen(copies, capsys):
    merge_here(copies, recipe(copies), dry_run=True, quiet=False, random_seed=11)
    printed = capsys.readouterr().out
    for text in (
        "mergekit 0.1.5", "device: cpu", "LlamaForCausalLM",
        "ties by merged.yaml, seed 11; computed in bfloat16, saved in bfloat16",
        "coverage: 90 of 90 tensors of the inputs are read", "density of code: mean 0.", "disk: ", "memory: about ",
    ):  # fmt: skip
        assert text in printed, text


@pytest.mark.slow
def test_memory_estimate_against_a_measurement(tmp_path):
    """The peak of private memory of a real merge with one large tensor, against the estimate: within a third."""
    save_models(tmp_path, names=("base", "code"), vocab_size=400_000, hidden_size=96)
    methods = ("ties", "dare_ties", "task_arithmetic", "guided_ties", "guided_mean")
    for method, counting in [*((method, False) for method in methods), ("ties", True)]:
        data = recipe(tmp_path, method, experts=("code",), dtype="float32")
        if method == "guided_mean":
            data["models"][1]["parameters"]["saliency"] = ""
        write_recipe(tmp_path / "r.yaml", data)
        estimate, measured = estimated_and_measured(tmp_path, executor=True, counting=counting)
        assert 0.7 < estimate / measured < 1.5, (method, counting, estimate / measured)


def test_slices_that_take_nothing_from_the_donor_are_no_tied_heads(copies, capsys):
    """Passthrough over slices: the tensors of another model's layers are stored by it alone, as they should be."""
    sources = [("base", [0, 2]), ("code", [1, 3])]
    data = {
        "slices": [{"sources": [{"model": str(copies / name), "layer_range": span}]} for name, span in sources],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }
    merge_here(copies, data, dry_run=True)
    assert capsys.readouterr().err == ""


def test_quiet_is_quiet(copies):
    """The last lines remain; on stderr, where warnings and the bar would be, there is nothing at all."""
    for name in ("code", "math"):  # fine-tunes of the base: else there is a warning to see
        edit_tensors(copies / name, lambda found: found.update(load_file(copies / "base" / "model.safetensors")))
    write_recipe(copies / "recipe.yaml", recipe(copies, tokenizer_source="union"))
    words = ["--merge_config", "recipe.yaml", "--output_path", "out", "--device", "cpu", "--quiet"]
    for more in ([], ["--overwrite", "--fast_selection", "False"]):
        done = run_here("utils/merger.py", *words, *more, cwd=copies)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[1].startswith("merged in ") and len(lines) == 6, done.stdout
