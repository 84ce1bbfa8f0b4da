"""tuned from a start that is measured in the same go, as `--guidance best` has it: the real commands, against the long way.

python -m pytest tests/guidance/tuned/test_guided_start.py
"""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.commands_here import done_here, refused_here, run_here
from tests.selected import few
from tests.tiny_experts import save_experts
from tests.tiny_merges import tensors
from tests.tiny_pairs import add_token
from utils.guidance.gram_mean import rounds
from utils.guidance.tuned import tuning
from utils.publishing.manifest import MANIFEST, file_sha256

STEPS = ("--tune_steps", "3")


def measure(out, *flags):
    return done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", out, *flags).stdout


def decide(measured, out, *flags):
    asked = ("--delta_dfs_in_dir", measured, "--config_file", "pair.yaml", "--out_dir", out)
    said = done_here("lewis_merge.py", *asked, *flags).stdout
    (path,) = Path(out).glob("*.yaml")
    return path, said


def merge(recipe, out):
    done_here("utils/merger.py", "--merge_config", recipe, "--output_path", out)
    return Path(out)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Experts that gain on their own text, measured by `best`."""
    folder = save_experts(tmp_path_factory.mktemp("pair"), nsamples=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("said").write_text(measure("best", "--guidance", "best", *STEPS))
    return folder


@pytest.fixture
def pair(measured, tmp_path, monkeypatch):
    folder = shutil.copytree(measured, tmp_path / "pair")
    monkeypatch.chdir(folder)
    return folder


def test_best_of_several_is_tuned_from_two_rounds_to_the_bit(pair):
    """By hand: two rounds, their recipe, tuned from it."""
    measure("grams", "--guidance", "gram_mean", "--rounds", "2")
    start, _ = decide("grams", "start", "--guidance", "gram_mean")
    measure("tuned", "--guidance", "tuned", "--start_recipe", start, *STEPS)
    by_hand, _ = decide("tuned", "recipes", "--guidance", "tuned")
    recipe, said = decide("best", "best_recipes", "--guidance", "best")
    apart = {MANIFEST, "tuned_start.yaml"}  # say where things lie
    by_hands = [path for path in (*Path("grams").iterdir(), *Path("tuned").iterdir()) if path.name not in apart]
    assert {path.name for path in by_hands} == {path.name for path in Path("best").iterdir()} - apart
    assert not [path for path in by_hands if file_sha256(path) != file_sha256(Path("best", path.name))]
    one, other = tensors(merge(by_hand, "merged_by_hand")), tensors(merge(recipe, "merged"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert not all(value.equal(tensors(Path("base"))[name]) for name, value in one.items())
    before, _ = decide("best", "untuned", "--guidance", "gram_mean")
    assert before.read_text() == start.read_text().replace("../grams/", "../best/")
    assert "best: tuned" in said and "start_recipe" not in said
    assert "best: tuned from what gram_mean gives (--rounds 2)" in Path("said").read_text()


def test_a_measured_folder_may_be_moved(pair):
    start = yaml.safe_load(Path("best/tuned_start.yaml").read_text())
    assert start["saliency"] == {name: f"{name}_grams.safetensors" for name in ("code", "math")}
    shutil.move("best", "elsewhere")
    recipe, _ = decide("elsewhere", "recipes", "--guidance", "best")
    assert merge(recipe, "merged").is_dir()


def test_losses_are_divided_by_their_own_gains_whatever_the_order_of_experts(pair):
    """By hand, from the losses in the other tables."""
    config = yaml.safe_load(Path("pair.yaml").read_text())
    targets = {"math": "./math", "code": "./code"}  # in model_info it is the other way round
    Path("pair.yaml").write_text(yaml.safe_dump(config | {"target_model_names": targets}, sort_keys=False))
    measure("dfs", "--guidance", "tuned", "--start", "gram_mean", "--tune_steps", "1")
    steps, losses = pd.read_csv("dfs/tuned_steps.csv"), pd.read_csv("dfs/gram_mean_losses.csv")
    lost = []
    for name in targets:
        own = losses[losses["model"] == name]
        base, expert = ((own[f"{key}_loss"] * own["tokens"]).sum() / own["tokens"].sum() for key in ("base", "expert"))
        held = own.tail(2)
        at_expert = (held["expert_loss"] * held["tokens"]).sum() / held["tokens"].sum()
        (merged,) = steps[(steps["step"] == 0) & (steps["samples"] == "held_out") & (steps["task"] == name)]["loss"]
        lost.append((merged - at_expert) / (base - expert))
    assert steps["share_lost"][0] == pytest.approx(sum(lost) / 2, rel=1e-5)


def held(folder):
    return {path.name: file_sha256(path) for path in Path(folder).iterdir()}


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name"), few([(rounds, "run_merge"), (tuning, "write_state")], (tuning, "write_state"))
)
def test_stopped_in_either_part_and_typed_again_it_goes_on_to_the_same_end(pair, monkeypatch, module, name):
    words = ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "again", "--guidance", "best", *STEPS)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, interrupted)
        assert run_here(*words).returncode == 130
    with monkeypatch.context() as patched:
        if module is tuning:  # nothing of the start is made again
            patched.setattr(rounds, "run_merge", None)
        assert "resumed" in done_here(*words).stdout
    assert held("again") == held("best")


def test_where_vocabularies_differ_best_says_what_it_takes_instead(pair):
    add_token(shutil.copytree("math", Path("longer")))
    Path("pair.yaml").write_text(Path("pair.yaml").read_text().replace("./math", "./longer"))
    refused_here(
        "flag-no-effect",
        "lewis_importance.py",
        "--config",
        "pair.yaml",
        "--out_dir",
        "dfs",
        "--guidance",
        "best",
        *STEPS,
    )
    said = measure("dfs", "--guidance", "best")
    assert "best: gram_mean in one round, since experts have other numbers of tokens" in said
    assert "nothing to do" in measure("dfs", "--guidance", "best")
    recipe, said = decide("dfs", "recipes", "--guidance", "best")
    assert yaml.safe_load(recipe.read_text())["merge_method"] == "gram_mean"
    assert "best: gram_mean, as it was measured" in said and "start_recipe" not in said


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"nsamples": 1}, "text-too-few-rows"),
        ({"global_parameters": {"ridge": -1}}, "global-parameter-value"),
    ],
)
def test_what_would_be_refused_after_the_first_measurement_is_refused_before_it(pair, no_weights, unread, keys, code):
    Path("pair.yaml").write_text(yaml.safe_dump(yaml.safe_load(Path("pair.yaml").read_text()) | keys))
    words = ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", "--guidance", "best", *STEPS)
    refused_here(code, *words)
