"""How methods are found, chosen and told apart; texts per expert; controls. Measured numbers are each method's own test.

python -m pytest tests/guidance/test_method.py
"""

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.commands_here import done_here, refused_here
from tests.conftest import ROOT
from tests.refusals import refused
from tests.tiny_pairs import write_config
from utils.flags import FlagParser
from utils.guidance.chosen import chosen_to_decide, chosen_to_measure, declare_flags, own_options
from utils.guidance.method import DEFAULT, guidance_methods
from utils.pair.config import read_pair_config
from utils.recipes.coefficients import lines_control, mean_density

MATH = {"path": "rows.jsonl", "text": "{question} {answer}", "seqlen": 32}
CODE = {"path": "rows.jsonl", "text": "{answer}", "seqlen": 32}


@pytest.fixture
def measure(pair):
    def run(*more, out="dfs"):
        return done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", out, *more, cwd=pair)

    return run


@pytest.fixture
def decide(pair):
    def run(*more, refused=""):
        flags = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "out", *more)
        if refused:
            return refused_here(refused, "lewis_merge.py", *flags, cwd=pair)
        return done_here("lewis_merge.py", *flags, cwd=pair)

    return run


def test_every_package_of_the_folder_is_a_method_with_flags_of_its_own():
    methods = guidance_methods()
    assert next(iter(methods)) == DEFAULT
    assert set(methods) == {path.parent.name for path in (ROOT / "utils/guidance").glob("*/method.py")}
    for half in ("measure", "decide"):
        flags = {id(flag): flag.name for method in methods.values() for flag in method.flags(half)}
        assert len(flags) == len(set(flags.values()))  # one that two methods share is one and the same


def test_knowing_the_methods_loads_none_of_their_libraries():
    script = (
        "import sys; from utils.guidance.method import guidance_methods; guidance_methods(); "
        "print(sorted({'torch', 'numpy', 'pandas', 'transformers', 'mergekit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_method_has_its_halves():
    for method in guidance_methods().values():
        measure, decide = (importlib.import_module(f"{method.package}.{half}") for half in ("measure", "decide"))
        assert callable(measure.choices) and callable(measure.measure) and callable(decide.decide)


def parsed(half, *words):
    parser = FlagParser()
    declare_flags(parser, half)
    return parser.parse_args([*words])


@pytest.mark.parametrize("in_config", [False, True])
def test_best_is_what_leads_for_so_many_experts(pair, in_config):
    several = replace(read_pair_config(pair / "pair.yaml"), guidance="best" if in_config else None, nsamples=32)
    one = replace(several, target_model_names={"math": "./math"})
    best = () if in_config else ("--guidance", "best")

    found = chosen_to_measure(parsed("measure", *best), several)
    assert (found.method.name, found.options["start"], found.options["rounds"]) == ("tuned", "gram_mean", 2)
    asked = chosen_to_measure(parsed("measure", *best, "--rounds", "1", "--tune_steps", "3"), several).options
    assert (asked["rounds"], asked["tune_steps"]) == (1, 3)
    few = chosen_to_measure(parsed("measure", *best), replace(several, nsamples=31))
    assert (few.method.name, few.options["rounds"]) == ("gram_mean", 2) and few.apart is not None
    asked = chosen_to_measure(parsed("measure", *best, "--tune_rate", "0.1"), replace(several, nsamples=31))
    assert (asked.method.name, asked.options["start"]) == ("tuned", "gram_mean")
    alone = chosen_to_measure(parsed("measure", *best), one)
    assert (alone.method.name, alone.options["rounds"], alone.apart) == ("gram_mean", 1, None)
    assert all("best" in chosen.said for chosen in (found, few, alone))
    with refused("flag-no-effect"):
        chosen_to_measure(parsed("measure", *best, "--tune_steps", "3"), one)
    with refused("start-twice"):
        chosen_to_measure(parsed("measure", *best, "--start_recipe", "recipe.yaml"), several)

    for measured, name in (("tuned", "tuned"), ("gram_mean", "gram_mean"), ("lewis", "tuned"), (None, "tuned")):
        decided = chosen_to_decide(parsed("decide", *best), several, measured)
        assert decided.method.name == name and decided.mean_density is None
    decided = chosen_to_decide(parsed("decide", *best), one, "gram_mean")
    assert (decided.method.name, decided.mean_density) == ("gram_mean", 0.1)
    assert "best" not in guidance_methods()


def test_a_method_has_the_flags_of_its_start(pair):
    config = read_pair_config(pair / "pair.yaml")
    words = ("--guidance", "tuned", "--start", "gram_mean", "--no-expert_inputs")
    options = chosen_to_measure(parsed("measure", *words), config).options
    assert (options["expert_inputs"], options["rounds"], options["tune_steps"]) == (False, 1, 10)
    plain = chosen_to_measure(parsed("measure", "--guidance", "tuned"), config).options
    assert plain["start"] is None and "rounds" not in plain
    for words, code in (
        (("--guidance", "tuned", "--rounds", "2"), "flag-no-effect"),
        (("--guidance", "tuned", "--start", "lewis"), "start-guidance-unfit"),
        (("--guidance", "gram_mean", "--start", "gram_mean"), "flag-no-effect"),
    ):
        with refused(code):
            chosen_to_measure(parsed("measure", *words), config)


def test_a_flag_of_two_methods_belongs_to_both():
    given = parsed("measure", "--expert_tokens", "8")
    for name in ("lewis", "gram_mean", "saliency_budget"):
        assert own_options(guidance_methods()[name], "measure", given)["expert_tokens"] == 8
    with refused("flag-no-effect"):
        own_options(guidance_methods()["sens_merging"], "measure", given)


@pytest.mark.parametrize(("half", "word", "command"), [("decide", "--no-expert-inputs", 1), ("measure", "--bound", 2)])
def test_a_flag_of_the_other_command_is_said_to_be_one(half, word, command, capsys):
    parser = FlagParser()
    declare_flags(parser, half)
    with pytest.raises(SystemExit):
        parser.parse([word])
    said = capsys.readouterr().err
    assert f"(command {command})" in said and "[flag-unknown]" in said


def test_each_expert_is_measured_on_its_own_text_and_so_is_the_base(pair, measure):
    measure(out="math_alone")
    write_config(pair, {"dataset": CODE})
    measure(out="code_alone")
    write_config(pair, {"calibration": {"math": MATH, "code": CODE}})
    ended = measure("--accept_useless_text", out="both")
    assert "text for math: 4 samples" in ended.stdout and "text for code: 4 samples" in ended.stdout
    for name in ("math", "code"):
        assert (pair / f"both/{name}_delta.csv").read_bytes() == (pair / f"{name}_alone/{name}_delta.csv").read_bytes()
    assert (pair / "both/code_delta.csv").read_bytes() != (pair / "math_alone/code_delta.csv").read_bytes()
    norms = pd.read_csv(pair / "both/norms.csv")
    for text in ("math", "code"):
        own = norms[norms["text"] == text].drop(columns="text")
        alone = pd.read_csv(pair / f"{text}_alone/norms.csv")
        pd.testing.assert_frame_equal(
            own.reset_index(drop=True), alone[alone["model"].isin(["base", text])].reset_index(drop=True)
        )


def test_texts_measured_side_by_side_give_the_same_bytes(pair, measure):
    write_config(pair, {"calibration": {"math": MATH, "code": CODE}})
    measure("--accept_useless_text", out="one")
    measure("--accept_useless_text", "--devices", "cpu,cpu,cpu", out="many")
    for name in ("math_delta.csv", "code_delta.csv"):
        one, many = (pd.read_csv(pair / folder / name) for folder in ("one", "many"))
        assert np.allclose(one, many, rtol=1e-3, atol=1e-6)  # other numbers of threads round otherwise


def test_a_recipe_comes_out_of_texts_per_expert(pair, measure, decide):
    write_config(pair, {"calibration": {"math": MATH}, "dataset": CODE})
    measure()
    ended = decide()
    assert "manifest" not in ended.stderr and "measured with" not in ended.stderr
    recipe = yaml.safe_load((pair / "out/pair_0.3_0.8_generated_ties_merge_config.yaml").read_text())
    assert len(recipe["models"]) == 3


def test_the_config_can_choose_the_method_and_a_flag_outranks_it(pair):
    flags = ("--config", "pair.yaml", "--out_dir", "dfs")
    write_config(pair, {"guidance": "lewiss"})
    refused_here("config-unknown-guidance", "lewis_importance.py", *flags, cwd=pair)
    done_here("lewis_importance.py", *flags, "--guidance", "lewis", cwd=pair)
    assert json.loads((pair / "dfs/manifest.json").read_text())["guidance"] == "lewis"


def test_what_another_method_measured_is_refused(pair, measure, decide):
    measure()
    manifest = json.loads((pair / "dfs/manifest.json").read_text())
    (pair / "dfs/manifest.json").write_text(json.dumps({**manifest, "guidance": "other"}))
    assert "--guidance lewis" in decide(refused="dataframes-other-guidance")


def test_a_lines_control_has_the_same_means_and_grows_with_depth(pair, measure, decide):
    measure()
    write_config(pair, {"global_parameters": {"normalize": False}})
    ended = decide("--control", "lines")
    name = "pair_0.3_0.8_generated_ties{}_merge_config.yaml"
    guided, control = (
        yaml.safe_load((pair / "out" / name.format(tag)).read_text())["models"][1]["parameters"]
        for tag in ("", "_lines")
    )
    assert guided["weight"] == [{"value": 1}]
    weights = {entry["filter"]: entry["value"] for entry in control["weight"][:-1]}
    first, second = ([value for text, value in weights.items() if f"layers.{layer}." in text] for layer in (0, 1))
    assert len(set(first)) == len(set(second)) == 1 and second[0] == pytest.approx(3 * first[0])
    assert len({entry["value"] for entry in control["density"][:-1]}) == 1
    assert "by depth" in ended.stdout and "merged_models/pair_0.3_0.8_generated_ties_lines" in ended.stdout


def test_lines_keeps_the_mean_weight_over_parameters():
    table = pd.DataFrame(
        {
            "model": "x",
            "tensor": list("abcd"),
            "layer": [-1, 0, 1, 2],
            "component": ["", "q", "q", "q"],
            "density": [1.0, 0.2, 0.4, 0.6],
            "weight": [0.5, 0.1, 0.2, 0.9],
            "params": [1000, 10, 30, 20],
        }
    )
    control = lines_control(table)
    assert mean_density(control, "weight") == pytest.approx(mean_density(table, "weight"))
    assert control["density"].tolist() == pytest.approx([1.0, *[np.average([0.2, 0.4, 0.6], weights=[10, 30, 20])] * 3])
    weights = control["weight"].to_numpy()
    assert weights[0] == weights[1] and weights[2] == pytest.approx(2 * weights[1]) == weights[3] * 2 / 3


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--guidance", "lewiss"), "flag-invalid"),
        (("--merge_method", "task_arithmetic"), "merge-method-unfit"),
        (("--control", "lewis"), "flag-invalid"),
    ],
)
def test_wrong_choices(decide, flags, code):
    decide(*flags, refused=code)
