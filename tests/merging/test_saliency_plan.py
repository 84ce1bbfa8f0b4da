"""guided_ties by command 3: tensors equal a dense version, the manifest says so, and every bad file is found before."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.commands_here import done_here
from tests.refusals import refused
from tests.tiny_checkpoints import FAMILIES, VOCABULARY, block_prefix
from tests.tiny_merges import (
    assert_refused,
    assert_same_tensors,
    merge_here,
    recipe,
    save_models,
    tensors,
    write_recipe,
)
from tests.tiny_pairs import save_tokenizer
from utils.commands.merge import merge
from utils.merging.settings import MergeSettings
from utils.recipes.saliency_vectors import FORMAT, vector_file_bytes

NAME = "model.layers.1.mlp.down_proj.weight"
DENSITIES = {"code": 0.25, "math": 0.4}


def measure(folder: Path, name: str, seed: int, rename=lambda tensor: tensor) -> dict:
    """Write random vectors for all matrices of a model; returns F by stored name."""
    generator, fisher, vectors = torch.Generator().manual_seed(seed), {}, {}
    for tensor, value in tensors(folder / name).items():
        if value.dim() == 2:
            axis0, axis1 = (torch.rand(n, generator=generator) ** 3 * 1e-6 + 1e-12 for n in value.shape)
            vectors[rename(tensor)] = axis0, axis1
            fisher[tensor] = axis0.double()[:, None] * axis1.double()
    (folder / f"{name}.vectors").write_bytes(vector_file_bytes(vectors))
    return fisher


def guided(folder: Path, family: str = "llama", **keys) -> dict:
    """A recipe that cuts the linear weights of every block by saliency, and nothing else."""
    models = [{"model": str(folder / "base")}]
    for place, (name, density) in enumerate(DENSITIES.items()):
        cut = [{"filter": f"{path}.weight", "value": density} for path in FAMILIES[family][2]]
        parameters = {"weight": 1.0 - 0.5 * place, "density": [*cut, {"value": 1.0}]}
        models.append(
            {"model": str(folder / name), "parameters": parameters | {"saliency": str(folder / f"{name}.vectors")}}
        )
    return {
        "models": models,
        "merge_method": "guided_ties",
        "base_model": str(folder / "base"),
        "dtype": "float32",
        **keys,
    }


def dense(folder: Path, family: str, fishers: dict, stored: str) -> torch.Tensor:
    """One merged tensor of `guided`, in float32, from whole saved tensors and torch.topk on delta^2 F."""
    base, changes, weights = tensors(folder / "base")[stored].float(), [], torch.tensor([1.0, 0.5])
    for (name, density), weight in zip(DENSITIES.items(), weights, strict=True):
        delta = tensors(folder / name)[stored].float() - base
        if stored.startswith(block_prefix(family)) and any(f"{path}.weight" in stored for path in FAMILIES[family][2]):
            worth = (delta.double() ** 2 * fishers[name][stored]).flatten()
            kept = worth.topk(int(density * worth.numel())).indices
            delta = torch.zeros(worth.numel()).index_copy_(0, kept, delta.flatten()[kept]).view_as(base)
        changes.append(weight * delta)
    stack = torch.stack(changes)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    divisor = (weights.view(2, *[1] * base.dim()) * agree).sum(0)
    return base + (stack * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.fixture(scope="module")
def llamas(llamas, tmp_path_factory) -> Path:
    """With vectors of the two experts."""
    folder = shutil.copytree(llamas, tmp_path_factory.mktemp("llamas"), dirs_exist_ok=True)
    for seed, name in enumerate(DENSITIES):
        measure(folder, name, seed)
    return folder


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_command_makes_what_the_dense_version_makes(tmp_path, family):
    """A real process, paths relative to where it runs; GPT-2 stores its weights transposed."""
    save_models(tmp_path, family)
    fishers = {name: measure(tmp_path, name, seed) for seed, name in enumerate(DENSITIES)}
    write_recipe(tmp_path / "recipe.yaml", guided(Path(), family))
    done = done_here(
        "utils/merger.py", "--output_path", "merged", "--merge_config", "recipe.yaml", "--device", "cpu", cwd=tmp_path
    )
    count = 3 * len(FAMILIES[family][2])
    assert f"saliency of code: {count} tensors are merged by the vectors in code.vectors" in done.stdout
    assert "all tensors by mergekit: guided_ties has no faster way here" in done.stdout
    merged, base = tensors(tmp_path / "merged"), tensors(tmp_path / "base")
    assert sorted(merged) == sorted(base)
    for stored, found in merged.items():
        expected = dense(tmp_path, family, fishers, stored)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=lambda text, at=stored: f"{at}: {text}")


def test_vectors_are_found_beside_the_recipe_wherever_the_folder_lies(copies, tmp_path_factory, monkeypatch):
    """The recipe names its vectors from where it lies; neither the current folder nor a move changes what they are."""
    data = guided(copies)
    for model in data["models"]:
        if "saliency" in model.get("parameters", {}):
            model["parameters"]["saliency"] = Path(model["parameters"]["saliency"]).name
    monkeypatch.chdir(copies)
    expected = merge_here(copies, data, "here")
    moved = tmp_path_factory.mktemp("moved") / "folder"
    moved.mkdir()
    for file in copies.glob("*.vectors"):
        file.rename(moved / file.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert_same_tensors(merge_here(moved, data, "there"), expected)
    again = moved.rename(moved.parent / "other")
    published = again / "there" / "mergekit_config.yml"
    merge(MergeSettings(output_path=again / "twice", merge_config=published, device="cpu", quiet=True))
    assert_same_tensors(again / "twice", expected)


def test_bfloat16_and_one_expert_by_magnitude(copies):
    """bf16 rounds what is kept, not which; without vectors an expert is cut as ties cuts it."""
    data = guided(copies, dtype="bfloat16")
    del data["models"][2]["parameters"]["saliency"]
    ours = tensors(merge_here(copies, data))[NAME]
    base, code, math = (tensors(copies / name)[NAME] for name in ("base", "code", "math"))
    fisher = measure(copies, "code", 0)[NAME]
    trimmed = []
    for expert, density, factor in ((code, 0.25, fisher), (math, 0.4, 1.0)):
        worth = ((expert - base).double() ** 2 * factor).flatten()
        mask = torch.zeros(len(worth), dtype=torch.bool)
        mask[worth.topk(int(density * len(worth))).indices] = True
        trimmed.append(torch.where(mask.view_as(base), expert, base))
    from mergekit.merge_methods.api import merge_tensors

    parameters = {"weight": [1.0, 0.5], "density": [1.0, 1.0]}
    assert torch.equal(ours, merge_tensors([base, *trimmed], "ties", parameters=parameters, base_index=0))


def test_vectors_may_use_another_name_of_the_tensor(tmp_path):
    """GPT-2 on the hub is stored without `transformer.`, which is how it is measured; saved anew it has it."""
    save_models(tmp_path, "gpt2")
    for seed, name in enumerate(DENSITIES):
        measure(tmp_path, name, seed)
    data = guided(tmp_path, "gpt2")
    first = tensors(merge_here(tmp_path, data, "first"))
    for seed, name in enumerate(DENSITIES):
        measure(tmp_path, name, seed, lambda tensor: tensor.removeprefix("transformer."))
    second = tensors(merge_here(tmp_path, data, "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_slices_take_the_vectors_of_the_layer_they_come_from(copies):
    """Layer 2 of the expert goes onto layer 0 of the base: what it was measured as counts, not where it ends up."""

    def sliced(layer: int) -> dict:
        expert = {"model": str(copies / "code"), "layer_range": [layer, layer + 1]}
        expert["parameters"] = {
            "weight": 1.0,
            "density": [{"filter": "down_proj.weight", "value": 0.25}, {"value": 1.0}],
            "saliency": str(copies / "code.vectors"),
        }
        sources = [{"model": str(copies / "base"), "layer_range": [0, 1]}, expert]
        return {
            "slices": [{"sources": sources}],
            "merge_method": "guided_ties",
            "base_model": str(copies / "base"),
            "dtype": "float32",
        }

    fisher = measure(copies, "code", 0)
    merged = tensors(merge_here(copies, sliced(2)))["model.layers.0.mlp.down_proj.weight"]
    base = tensors(copies / "base")["model.layers.0.mlp.down_proj.weight"].float()
    expert = tensors(copies / "code")["model.layers.2.mlp.down_proj.weight"].float()
    worth = ((expert - base).double() ** 2 * fisher["model.layers.2.mlp.down_proj.weight"]).flatten()
    kept = worth.topk(int(0.25 * len(worth))).indices.sort().values
    assert torch.equal((merged != base).flatten().nonzero().flatten(), kept)


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_manifest_and_card_say_the_files(copies):
    merged = merge_here(copies, guided(copies))
    manifest = json.loads((merged / "manifest.json").read_text())
    assert manifest["saliency"] == [
        {
            "name": f"{name}.vectors",
            "bytes": (copies / f"{name}.vectors").stat().st_size,
            "sha256": hashlib.sha256((copies / f"{name}.vectors").read_bytes()).hexdigest(),
            "tensors": {name: 21},
        }
        for name in DENSITIES
    ]
    card = (merged / "README.md").read_text()
    assert "by `guided_ties` (mergekit's `ties`, with the entries to keep chosen by saliency)" in card
    unsaid = "(change squared, times the squared gradient, to the power that the file was made with)"
    assert f"- `code`: the entries of largest saliency {unsaid}" in card and "in 21 tensors, by `code.vectors`" in card
    assert "| `code` |" in card and "| 21 of 30 |" in card
    kept = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    assert [entry["parameters"]["saliency"] for entry in kept["models"][1:]] == ["../code.vectors", "../math.vectors"]
    for path in merged.rglob("*"):
        assert str(copies).encode() not in path.read_bytes(), path.name


def test_other_methods_have_no_such_record(copies):
    merged = merge_here(copies, recipe(copies))
    assert "saliency" not in json.loads((merged / "manifest.json").read_text())
    assert "aliency" not in (merged / "README.md").read_text()


def test_paths_with_a_tilde(copies, monkeypatch):
    monkeypatch.setenv("HOME", str(copies))
    data = guided(copies)
    expected = tensors(merge_here(copies, data, "expected"))
    for name, entry in zip(DENSITIES, data["models"][1:], strict=True):
        entry["parameters"]["saliency"] = f"~/{name}.vectors"
    found = tensors(merge_here(copies, data))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [entry["name"] for entry in json.loads((copies / "merged" / "manifest.json").read_text())["saliency"]] == [
        "code.vectors",
        "math.vectors",
    ]


def test_what_does_nothing_is_said(copies, capsys):
    data = guided(copies)
    data["models"][1]["parameters"]["density"] = 1.0
    merge_here(copies, data, dry_run=True)
    errors = capsys.readouterr().err
    assert "the saliency file code.vectors is not used: where it applies, every density is 0 or 1" in errors
    assert "math.vectors" not in errors
    for entry in data["models"][1:]:
        del entry["parameters"]["saliency"]
    merge_here(copies, data, dry_run=True)
    assert "no model names a file of saliency vectors" in capsys.readouterr().err


# --- bad input --------------------------------------------------------------------------------------------------------


def edit(change):
    """Rewrite the vectors of `code` after `change` has been at them."""

    def spoil(copies: Path, _data: dict) -> None:
        from safetensors import safe_open

        path = copies / "code.vectors"
        with safe_open(path, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        change(found)
        save_file(found, path, metadata={"format": FORMAT})

    return spoil


def set_entry(value: float):
    def change(found):
        found[f"{NAME}.axis1"][3] = value

    return edit(change)


def _other_path(_copies, data):
    data["models"][1]["parameters"]["saliency"] = "nowhere/vectors.safetensors"


def _other_format(copies, _data):
    save_file({"x": torch.ones(1)}, copies / "code.vectors", metadata={"format": "pt"})


def _a_number(_copies, data):
    data["models"][1]["parameters"]["saliency"] = 5


def _shared(_copies, data):
    data["models"][1]["parameters"]["vote"] = False


def _another_model(copies, data):
    data["models"][1]["parameters"]["density"][0] = {"filter": "self_attn.q_proj.weight", "value": 0.5}
    change = edit(lambda found: found.update({f"{NAME}.axis0": torch.ones(40)}))
    change(copies, data)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda copies, _: (copies / "code.vectors").unlink(), "vectors-missing", "lewis_importance.py"),
        (_other_path, "vectors-missing", "nowhere/vectors.safetensors"),
        (lambda copies, _: (copies / "code.vectors").write_bytes(b"x" * 50), "vectors-malformed", "code.vectors"),
        (_other_format, "vectors-of-other-format", "code.vectors"),
        (edit(lambda found: found.pop(f"{NAME}.axis0")), "saliency-missing-tensor", f"no vectors of {NAME}"),
        (_another_model, "saliency-shape", "length 40 and 48"),
        (set_entry(float("nan")), "vectors-not-finite", f"{NAME}.axis1"),
        (set_entry(float("inf")), "vectors-not-finite", f"{NAME}.axis1"),
        (set_entry(-1.0), "vectors-not-finite", f"{NAME}.axis1"),
        (_a_number, "recipe-wrong-type", "models[1].parameters.saliency"),
        (_shared, "recipe-shared-parameter", "models[1].parameters.vote"),
    ],
)
def test_bad_input_is_found_before_weights_are_read(copies, spoil, code, words, no_weights):
    data = guided(copies)
    spoil(copies, data)
    assert_refused(copies, data, code, words)


def test_many_missing_tensors_make_a_short_message(copies):
    (copies / "code.vectors").write_bytes(vector_file_bytes({}))
    with refused("saliency-missing-tensor", "and 16 more") as caught:
        merge_here(copies, guided(copies))
    assert len(str(caught.value).splitlines()) < 12


def test_what_is_no_matrix_is_cut_by_magnitude(copies):
    data = guided(copies)
    for entry in data["models"][1:]:
        entry["parameters"]["density"].insert(0, {"filter": "norm", "value": 0.25})
    by_magnitude = copy.deepcopy(data)
    for entry in by_magnitude["models"][1:]:
        entry["parameters"]["saliency"] = ""
    ours, theirs = (tensors(merge_here(copies, one, name)) for one, name in ((data, "by"), (by_magnitude, "plain")))
    norms = [name for name in ours if "norm" in name]
    assert norms and all(torch.equal(ours[name], theirs[name]) for name in norms)
    assert not torch.equal(ours[NAME], theirs[NAME])


def test_an_aligned_vocabulary_is_refused(copies):
    save_tokenizer(copies / "math", chat_template="{{ messages }}", size=VOCABULARY - 1)
    data = guided(copies, tokenizer_source="union")
    merge_here(copies, data, "apart")  # nothing of the vocabulary is cut
    for entry in data["models"][1:]:
        entry["parameters"]["density"].insert(0, {"filter": "embed_tokens", "value": 0.5})
    with refused("saliency-vocabulary"):
        merge_here(copies, data)


def test_a_file_that_changes_under_way_is_noticed(copies, monkeypatch):
    from utils.merging import run as merge_run

    run = merge_run.run_merge

    def slow(*arguments):
        run(*arguments)
        measure(copies, "math", 99)

    monkeypatch.setattr(merge_run, "run_merge", slow)
    with refused("merge-input-changed"):
        merge_here(copies, guided(copies))
    assert not (copies / "merged").exists()
