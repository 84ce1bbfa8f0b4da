"""tuned from a start to a merged model: gradients against autograd over a dense sum, recipes, bad input.

python -m pytest tests/guidance/tuned
"""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from tests.commands_here import done_here, refused_here, run_here
from tests.refusals import refused
from tests.tiny_merges import merge_here, tensors
from tests.tiny_pairs import CALIBRATION, add_token, save_pair, write_config
from tests.tiny_recipes import decide_here, own_defaults, read_here
from utils.commands.measure import MeasureOptions, measure_pair
from utils.guidance.method import guidance_methods
from utils.guidance.tuned import tuning
from utils.guidance.tuned.parts import SummedWeights
from utils.guidance.tuned.start import plain_start, read_start
from utils.guidance.tuned.tables import read_tuned
from utils.pair.config import read_pair_config
from utils.passes.snapshots import write_state

NAMES = ("code", "math")
START, BAD = Path("start/start.yaml"), Path("start/bad.yaml")


def measure(guidance="tuned", out="dfs", **options):
    config, method = read_pair_config(Path("pair.yaml")), guidance_methods()[guidance]
    own = own_defaults(guidance, "measure") | {"accept_useless_text": True} | options
    measure_pair(MeasureOptions(config, method, own, Path(out), "cpu", "float32"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A pair, tuned from the plain mean and from gram_mean's answer. Random models gain nothing on their texts."""
    folder = save_pair(tmp_path_factory.mktemp("pair"))
    write_config(folder, {"calibration": CALIBRATION, "nsamples": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        measure("gram_mean", "grams")
        (recipe,) = decide_here("gram_mean", "grams", "start")
        start = yaml.safe_load(recipe.read_text())
        start["parameters"]["ridge"] = 1e-2
        START.write_text(yaml.safe_dump(start))
        measure("tuned", "dfs", tune_steps=4)
        measure("tuned", "dfs_gram", tune_steps=4, start_recipe=str(START))
    return folder


@pytest.fixture
def pair(measured, tmp_path, monkeypatch):
    folder = shutil.copytree(measured, tmp_path / "pair")
    monkeypatch.chdir(folder)
    return folder


def coefficients(folder):
    table = pd.read_csv(Path(folder) / "tuned_coefficients.csv")
    return {name: own.set_index("tensor")["coefficient"].to_dict() for name, own in table.groupby("model")}


def dense_loss(weights, ids):
    """The mean loss per token, by transformers, of a model with these weights (float32, differentiable)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in ids:
        logits = torch.func.functional_call(model, weights, kwargs={"input_ids": torch.tensor([row])}).logits[0, :-1]
        total = total - logits.log_softmax(-1)[range(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    return total / count


def samples(expert):
    from transformers import AutoTokenizer

    from utils.pair.calibration import choose_samples
    from utils.pair.tokens import encode

    config = read_pair_config("pair.yaml")
    source = config.text_of(expert)
    return encode(choose_samples(source, config.nsamples), AutoTokenizer.from_pretrained("base"), source.seqlen, "test")


def plain_parts():
    base = {name: value.float() for name, value in tensors(Path("base")).items()}
    return base, {expert: {n: tensors(Path(expert))[n].float() - base[n] for n in base} for expert in NAMES}


def gram_parts():
    """What each expert adds, by command 3: all factors but one at 0."""
    recipe, found = read_here(START), {}
    base = {name: value.float() for name, value in tensors(Path("base")).items()}
    for place, expert in enumerate(NAMES):
        for number, model in enumerate(recipe["models"][1:]):
            model["parameters"]["factor"] = float(number == place)
        merged = tensors(merge_here(Path(), {**recipe, "dtype": "float32", "out_dtype": "float32"}, f"part_{expert}"))
        found[expert] = {name: merged[name] - base[name] for name in base}
    return base, found


@pytest.mark.parametrize(("folder", "parts", "weight"), [("dfs", plain_parts, 0.5), ("dfs_gram", gram_parts, 1.0)])
def test_the_first_step_goes_against_the_gradient_of_every_coefficient(pair, folder, parts, weight):
    """Adam's first step is the rate times the sign of the gradient."""
    own = {"start_recipe": str(START)} if folder == "dfs_gram" else {}
    measure("tuned", "one", tune_steps=1, tune_rate=1e-4, **own)
    base, parts = parts()
    table = {t: {name: torch.ones((), requires_grad=True) for name in base} for t in NAMES}
    weights = {name: base[name] + sum(weight * table[t][name] * parts[t][name] for t in NAMES) for name in base}
    losses = [dense_loss(weights, samples(t)[:-2]) for t in NAMES]  # the last quarter is held out
    sum(losses).backward()
    steps = pd.read_csv("one/tuned_steps.csv")
    assert steps[steps["samples"] == "stepped"]["loss"].tolist() == pytest.approx(
        [float(loss.detach()) for loss in losses], rel=1e-5
    )
    held = [float(dense_loss({n: w.detach() for n, w in weights.items()}, samples(t)[-2:])) for t in NAMES]
    assert steps[steps["samples"] == "held_out"]["loss"].tolist()[:2] == pytest.approx(held, rel=1e-5)
    experts = [float(dense_loss({n: w.float() for n, w in tensors(Path(t)).items()}, samples(t)[-2:])) for t in NAMES]
    lost = sum(merged - own for merged, own in zip(held, experts, strict=True)) / 2  # no sure gain divides these losses
    assert steps["share_lost"][0] == pytest.approx(lost, abs=1e-5)
    if steps[steps["kept"] == 1]["step"].iloc[0] == 0:
        pytest.skip("the step was no better on what is held out")
    slopes = {t: {n: float(value.grad) for n, value in own.items()} for t, own in table.items()}
    most = max(abs(slope) for own in slopes.values() for slope in own.values())
    for t, own in coefficients("one").items():
        for name, value in own.items():
            if abs(slopes[t][name]) > 1e-3 * most:
                expected = 1 - 1e-4 * (1 if slopes[t][name] > 0 else -1)
                assert value == pytest.approx(expected, abs=1e-6), (t, name)


def test_no_more_than_a_block_is_summed_up_at_a_time(pair, monkeypatch):
    asked, fetch = [], SummedWeights.fetch

    def noted(self, names):
        asked.append({name.split(".")[2] if name.startswith("model.layers.") else "outside" for name in names})
        return fetch(self, names)

    monkeypatch.setattr(SummedWeights, "fetch", noted)
    measure("tuned", "one", tune_steps=1)
    assert {"0"} in asked and {"1"} in asked and all(len(blocks) <= 1 for blocks in asked)


def test_steps_lose_less_on_what_they_step_on(pair):
    for folder in ("dfs", "dfs_gram"):
        steps = pd.read_csv(f"{folder}/tuned_steps.csv")
        by_step = steps[steps["samples"] == "stepped"].groupby("step")["loss"].sum()
        assert by_step.iloc[-1] < by_step.iloc[0]


def test_plain_coefficients_are_a_recipe_for_any_mergekit(pair):
    (path,) = decide_here("tuned", "dfs", out_dtype="float32")
    recipe = read_here(path)
    assert recipe["merge_method"] == "task_arithmetic" and recipe["parameters"]["normalize"] is False
    found = tensors(merge_here(pair, {**recipe, "dtype": "float32"}, "merged"))
    base, parts = plain_parts()
    own = coefficients("dfs")
    for name, value in found.items():
        expected = base[name] + sum(0.5 * own[t][name] * parts[t][name] for t in NAMES)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_coefficients_of_a_gram_mean_are_factors_of_its_parts(pair):
    (path,) = decide_here("tuned", "dfs_gram", merge_method="gram_mean", out_dtype="float32")
    recipe = read_here(path)
    start = read_here(START)
    assert recipe["parameters"] == start["parameters"]
    for model, before in zip(recipe["models"][1:], start["models"][1:], strict=True):
        assert model["parameters"]["weight"] == before["parameters"]["weight"]
        assert Path(model["parameters"]["saliency"]).name == Path(before["parameters"]["saliency"]).name
    found = tensors(merge_here(pair, {**recipe, "dtype": "float32"}, "merged"))
    base, parts = gram_parts()
    own = coefficients("dfs_gram")
    for name, value in found.items():
        expected = base[name] + sum(own[t][name] * parts[t][name] for t in NAMES)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_command_2_names_the_command_that_tunes_a_gram_mean_of_several(pair):
    asked = (
        "--config_file",
        "pair.yaml",
        "--delta_dfs_in_dir",
        "grams",
        "--out_dir",
        "out/recipes",
        "--guidance",
        "gram_mean",
    )
    lines = [
        line for line in done_here("lewis_merge.py", *asked).stdout.replace("\\\n", " ").splitlines() if "tuned" in line
    ]
    words = shlex.split(lines[-1])[2:]
    done_here("lewis_importance.py", *words, "--tune_steps", "1")
    assert set(coefficients("out/tuned")) == set(NAMES)
    start = yaml.safe_load(Path("out/tuned/tuned_start.yaml").read_text())
    assert start["merge_method"] == "gram_mean"

    cut = done_here("lewis_merge.py", *asked, "--mean_density", "0.5").stdout  # cannot be started from
    tuned = ("--config_file", "pair.yaml", "--delta_dfs_in_dir", "out/tuned", "--out_dir", "out/tuned_recipes")
    again = done_here("lewis_merge.py", *tuned, "--guidance", "tuned", "--merge_method", "gram_mean").stdout
    assert "start_recipe" not in cut + again


def test_coefficients_are_for_the_method_they_were_tuned_for(pair):
    with refused("merge-method-unfit"):
        decide_here("tuned", "dfs_gram", merge_method="task_arithmetic")
    with refused("merge-method-unfit"):
        decide_here("tuned", "dfs", merge_method="gram_mean")


def test_coefficients_are_for_the_parts_that_they_were_tuned_for(pair):
    start = yaml.safe_load(Path("dfs_gram/tuned_start.yaml").read_text())
    file = Path("grams/math_grams.safetensors")
    start["saliency"]["math"] = str(file.resolve())
    Path("dfs_gram/tuned_start.yaml").write_text(yaml.safe_dump(start))
    assert decide_here("tuned", "dfs_gram", merge_method="gram_mean")
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    with refused("tuned-parts-changed"):
        decide_here("tuned", "dfs_gram", out="other", merge_method="gram_mean")
    file.unlink()
    with refused("tuned-parts-changed"):
        decide_here("tuned", "dfs_gram", out="other", merge_method="gram_mean")


def test_coefficients_are_for_the_experts_that_were_tuned_together(pair):
    config = yaml.safe_load(Path("pair.yaml").read_text())
    write_config(pair, {**config, "target_model_names": {"math": "./math"}})
    with refused("tuned-other-experts"):
        decide_here("tuned", "dfs")


@pytest.mark.parametrize("level", ["part", "block", "expert"])
def test_a_level_shares_coefficients(pair, level):
    measure("tuned", "one", tune_steps=2, tune_level=level, tune_for="worst")
    values = coefficients("one")["code"]
    block = {value for name, value in values.items() if name.startswith("model.layers.0.mlp")}
    assert len(block) == 1
    if level == "expert":
        assert len(set(values.values())) == 1


def test_experts_without_gain_are_refused(pair):
    with refused("text-without-gain"):
        measure("tuned", "other", accept_useless_text=False)
    assert {path.name for path in Path("other").iterdir()} == {".measuring.part"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"merge_method": "ties"}, "tuned-start-method"),
        ({"parameters": {"normalize": True}}, "tuned-start-normalize"),
        ({"models": [{"model": "./base"}, {"model": "./code", "parameters": {"weight": 1}}]}, "tuned-start-models"),
    ],
)
def test_a_start_that_cannot_be_tuned_is_refused(pair, change, code):
    recipe = yaml.safe_load(START.read_text())
    BAD.write_text(yaml.safe_dump({**recipe, **change}))
    with refused(code):
        measure("tuned", "other", start_recipe=str(BAD))


def test_experts_with_more_tokens_are_refused_before_weights_are_read(pair, no_weights):
    add_token(shutil.copytree("math", Path("longer")))
    config = Path("pair.yaml").read_text()
    Path("longer.yaml").write_text(config.replace("./math", "./longer"))
    words = ("--config", "longer.yaml", "--out_dir", "other", "--guidance", "tuned")
    refused_here("tuned-shapes", "lewis_importance.py", *words)


def test_a_start_that_is_not_there_is_refused_by_its_name(pair, no_weights):
    with refused("file-missing", "--start_recipe lost.yaml"):
        measure("tuned", "other", start_recipe="lost.yaml")


def test_factors_are_shown_by_layer_and_counted(pair):
    asked = (
        "--config_file",
        "pair.yaml",
        "--delta_dfs_in_dir",
        "dfs_gram",
        "--out_dir",
        "shown",
        "--guidance",
        "tuned",
    )
    said = done_here("lewis_merge.py", *asked).stdout
    assert said.count("  factor ") == len(NAMES) and re.search(r"^filters: [1-9]\d* per expert", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ({"weight": [{"filter": "q_proj", "value": 0.1}, {"value": 1}]}, "tuned-start-weight"),
        ({"weight": 0.5, "density": 0.3}, "tuned-start-parameter"),
    ],
)
def test_a_start_needs_one_weight_and_whole_changes(pair, own, code):
    recipe = yaml.safe_load(START.read_text())
    recipe["models"][1]["parameters"] |= own
    BAD.write_text(yaml.safe_dump(recipe))
    config = read_pair_config("pair.yaml")
    with refused(code):
        read_start(BAD, config.base, config.experts)


def test_stopped_between_steps_and_typed_again_it_goes_on_to_the_same_end(pair, monkeypatch):
    words = ["lewis_importance.py", "--config", "pair.yaml", "--guidance", "tuned", "--accept_useless_text"]
    words += ["--tune_steps", "4", "--tune_rate", "0.01", "--dtype", "float32", "--devices", "cpu", "--out_dir"]
    kept = []

    def stop(*given):
        kept.append(write_state(*given))
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "write_state", stop)
        assert run_here(*words, "one").returncode == 130
    assert list(Path("one").glob(".measuring.part/*/tuned+steps.snapshot")) and not Path("one/manifest.json").exists()
    assert "resumed" in done_here(*words, "one").stdout
    done_here(*words, "two")
    for name in ("tuned_coefficients.csv", "tuned_steps.csv"):
        assert (Path("one") / name).read_bytes() == (Path("two") / name).read_bytes()
    assert not Path("one/.measuring.part").exists()


def test_what_was_started_from_is_read_back(pair):
    config = read_pair_config("pair.yaml")
    _, start = read_tuned(Path("dfs"), NAMES, NAMES)
    assert start == plain_start(config.experts)
    _, start = read_tuned(Path("dfs_gram"), NAMES, NAMES)
    now = read_start(START, config.base, config.experts)
    assert replace(start, saliency={}) == replace(now, saliency={})  # the measured pair was in another folder
    assert {Path(file).name for file in start.saliency.values()} == {"code_grams.safetensors", "math_grams.safetensors"}
    Path("dfs/tuned_start.yaml").write_text("weights: {}\n")
    with refused("tuned-start-damaged"):
        read_tuned(Path("dfs"), NAMES, NAMES)
