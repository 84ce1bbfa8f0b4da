"""The pair config: the reference's files read as they are; every mistake is named, all of them at once.

python -m pytest tests/pair/test_config.py
"""

import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.tiny_pairs import pair_settings, write_config
from utils.errors import UserError
from utils.pair.config import CONFIG_KEYS, ModelEntry, PairConfig, read_pair_config
from utils.pair.source import CalibrationSource


def read(folder: Path, **changes) -> PairConfig:
    return read_pair_config(write_config(folder, changes))


def refusal(folder: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **changes)
    assert str(caught.value).startswith(f"pair config {folder / 'pair.yaml'}: ")
    return str(caught.value)


def read_text(folder: Path, text: str) -> PairConfig:
    (folder / "pair.yaml").write_text(text)
    return read_pair_config(folder / "pair.yaml")


MATH_TEXT = {"path": "m.jsonl", "text": "{a}", "seed": 7}


def test_experts_may_have_texts_of_their_own(tmp_path):
    config = read(tmp_path, calibration={"math": "gsm8k"}, dataset="mbpp", seqlen=64)
    assert config.text_of("math") == CalibrationSource(name="gsm8k", seqlen=64)
    assert config.text_of("code") == config.dataset == CalibrationSource(name="mbpp", seqlen=64)
    assert set(config.texts) == {config.dataset, config.text_of("math")}
    every = read(tmp_path, calibration={"math": MATH_TEXT, "code": MATH_TEXT})
    assert every.texts == (CalibrationSource(path="m.jsonl", text="{a}", seed=7),)
    assert read(tmp_path).texts == (read(tmp_path).dataset,)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({}, "calibration must map"),
        ("gsm8k", "calibration must map"),
        ({"base": "gsm8k"}, "names the base type 'base'"),
        ({"mathh": "gsm8k"}, "type 'mathh' is not an expert in model_info; did you mean 'math'?"),
        ({1: "gsm8k"}, "type 1 is not an expert"),
        ({"math": "gsm9k"}, "calibration.math 'gsm9k' is unknown"),
        ({"math": 3}, "calibration.math must be a name"),
        ({"math": {"paht": "x"}}, "unknown key calibration.math.'paht'; did you mean 'path'?"),
        ({"math": {"name": "gsm8k", "seqlen": 1}}, "calibration.math.seqlen must be a whole number"),
    ],
)
def test_texts_that_cannot_be_meant(tmp_path, calibration, words):
    assert words in refusal(tmp_path, calibration=calibration)


def test_an_expert_without_text(tmp_path):
    assert "calibration has no text for type 'code', and there is no dataset for it" in refusal(
        tmp_path, calibration={"math": "gsm8k"}, dataset=None
    )


def test_guidance_is_a_name(tmp_path):
    assert read(tmp_path).guidance is None
    assert read(tmp_path, guidance="sens_merging").guidance == "sens_merging"
    assert "guidance must be the name of a method" in refusal(tmp_path, guidance=3)


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_every_shipped_config_reads():
    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert {"gemma_2b.yaml", "gemma_9b.yaml", "mathcoder_8b.yaml"} <= {path.name for path in found}
    for path in found:
        config = read_pair_config(path)
        assert config.experts and config.base.type == config.base_model_type


def test_the_reference_config_of_the_golden_run(golden):
    config = read_pair_config(golden / "sparsity50" / "pair.yaml")
    assert config.components == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert config.sparsity_ratio == 0.5
    assert config.prefix_mapping["gate_proj"] == "mlp.gate_proj"
    assert dict(config.global_parameters) == {"normalize": True, "int8_mask": True}


def test_defaults(tmp_path):
    (tmp_path / "pair.yaml").write_text("model_info: [{name: m/base, type: base}, {name: m/code, type: code}]")
    config = read_pair_config(tmp_path / "pair.yaml")
    assert config == PairConfig(
        path=tmp_path / "pair.yaml",
        model_info=(ModelEntry("m/base", "base"), ModelEntry("m/code", "code")),
        dataset=CalibrationSource(name="mbpp", seed=42, seqlen=512),
        sparsity_ratio=0.0,
        nsamples=15,
        components=None,
        base_model_type="base",
        base_model_name="m/base",
        target_model_names={"code": "m/code"},
        global_parameters={},
        prefix_mapping={},
        parity=False,
    )


def test_any_number_of_experts_and_types_with_underscores(tmp_path):
    models = [{"name": f"m/{i}", "type": f"skill_{i}_x"} for i in range(30)]
    config = read(tmp_path, model_info=models, base_model_type="skill_7_x")
    assert config.base == ModelEntry("m/7", "skill_7_x")
    assert [entry.name for entry in config.experts] == [f"m/{i}" for i in range(30) if i != 7]


def test_settings_reach_their_fields(tmp_path):
    config = read(
        tmp_path,
        dataset={"name": "gsm8k", "subset": "socratic", "split": "train", "seed": 7, "seqlen": 99},
        sparsity_ratio=0.25,
        nsamples=3,
        components=["mlp.c_proj", "q_proj"],
        prefix_mapping={"mlp.c_proj": "mlp.c_proj", "q_proj": "attn.q_proj", "unused": "a.b"},
        base_model_name="./base",
        target_model_names={"math": "./math"},
        global_parameters={"normalize": True, "lambda": 0.5, "weight": [0.1, {"filter": "mlp", "value": [0, 1]}]},
        parity="reference",
        seed=1,
    )
    assert config.dataset == CalibrationSource(name="gsm8k", subset="socratic", split="train", seed=7, seqlen=99)
    assert (config.sparsity_ratio, config.nsamples, config.parity) == (0.25, 3, True)
    assert config.components == ("mlp.c_proj", "q_proj")
    assert config.prefix_mapping["q_proj"] == "attn.q_proj"
    assert config.target_model_names == {"math": "./math"}
    assert config.global_parameters["weight"][1]["value"] == [0, 1]


def test_top_level_seed_and_seqlen_are_the_defaults_of_the_dataset(tmp_path):
    config = read(tmp_path, dataset="gsm8k", seed=5, seqlen=64)
    assert (config.dataset.seed, config.dataset.seqlen) == (5, 64)


def test_a_template_may_span_lines(tmp_path):
    text = "Question: {question}\n\tAnswer: {answer}\n"
    assert read(tmp_path, dataset={"path": "rows.jsonl", "text": text}).dataset.text == text


@pytest.mark.parametrize("number", ["0x10", "1_6", "16"])
def test_numbers_that_mean_what_they_say(tmp_path, number):
    text = yaml.safe_dump(pair_settings()).replace("nsamples: 4", f"nsamples: {number}")
    assert read_text(tmp_path, text).nsamples == 16


def test_the_config_is_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read(tmp_path).nsamples = 3


def test_options_survive_a_manifest_and_leave_out_what_is_not_measured(tmp_path):
    options = read(tmp_path, components=["q_proj"], parity="reference").options()
    assert json.loads(json.dumps(options)) == options
    assert options["components"] == ["q_proj"] and options["parity"] == "reference"
    other = read(tmp_path, global_parameters={"normalize": False}, target_model_names={"code": "./code"}).options()
    assert other == read(tmp_path).options()


def test_home_in_the_path_of_the_config(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_pair_config("~/pair.yaml").path == tmp_path / "pair.yaml"


# --- what is refused --------------------------------------------------------------------------------------------------

BASE, CODE, MATH = pair_settings()["model_info"]


def models(**change_of_code):
    return [BASE, {**CODE, **change_of_code}, MATH]


LONG = "x" * 300
REFUSED = {
    # unknown keys, with the nearest known one
    "unknown key": ({"nsample": 3}, ["unknown key 'nsample'; did you mean 'nsamples'?"]),
    "far from any key": ({"zzz": 3}, ["unknown key 'zzz'; known keys: model_info, dataset"]),
    "unknown dataset key": ({"dataset": {"name": "mbpp", "splt": "x"}}, ["dataset.'splt'", "did you mean 'split'?"]),
    "unknown model key": ({"model_info": models(typ="x")}, ["model_info[1].'typ'", "did you mean 'type'?"]),
    "a key that YAML reads as true": ({True: 3}, ["unknown key True"]),
    # wrong types
    "nsamples as text": ({"nsamples": "15"}, ["nsamples must be a whole number from 1", "got '15'"]),
    "nsamples as float": ({"nsamples": 15.5}, ["nsamples must be a whole number", "got 15.5"]),
    "nsamples as bool": ({"nsamples": True}, ["nsamples must be a whole number", "got True"]),
    "nsamples missing its value": ({"nsamples": None}, ["nsamples must be a whole number", "got nothing"]),
    "nsamples 0": ({"nsamples": 0}, ["nsamples must be a whole number from 1 to 1000000, got 0"]),
    "nsamples negative": ({"nsamples": -1}, ["got -1"]),
    "nsamples huge": ({"nsamples": 10**9}, ["from 1 to 1000000, got 1000000000"]),
    "seed negative": ({"seed": -1}, ["seed must be a whole number from 0"]),
    "seqlen 1": ({"dataset": {"name": "mbpp", "seqlen": 1}}, ["dataset.seqlen must be a whole number from 2"]),
    "components as text": ({"components": "q_proj"}, ["components must be 'auto' or a list", "got 'q_proj'"]),
    "type that YAML reads as false": ({"model_info": models(type=False)}, ["model_info[1].type", "put it in quotes"]),
    "type that is a number": ({"model_info": models(type=7)}, ["model_info[1].type must be text (put it in quotes)"]),
    "base type that is a bool": ({"base_model_type": True}, ["base_model_type must be text", "got True"]),
    "parity other": ({"parity": "yes"}, ["parity must be 'reference' or left out, got 'yes'"]),
    "parity true": ({"parity": True}, ["parity must be 'reference'"]),
    "prefix_mapping a list": ({"prefix_mapping": ["a"]}, ["prefix_mapping must map component to module path"]),
    "global_parameters a list": ({"global_parameters": [1]}, ["global_parameters must be a mapping"]),
    # sparsity_ratio
    "sparsity in percent": ({"sparsity_ratio": 50}, ["sparsity_ratio must be a number of at least 0", "50% is 0.5"]),
    "sparsity negative": ({"sparsity_ratio": -0.1}, ["sparsity_ratio", "got -0.1"]),
    "sparsity 1": ({"sparsity_ratio": 1.0}, ["below 1, got 1.0"]),
    "sparsity nan": ({"sparsity_ratio": math.nan}, ["sparsity_ratio", "got nan"]),
    "sparsity null": ({"sparsity_ratio": None}, ["sparsity_ratio", "got nothing"]),
    "sparsity as YAML 1.1 text": ({"sparsity_ratio": "1e-3"}, ["got '1e-3'; write it with a point"]),
    # components and prefixes
    "no components": ({"components": []}, ["components must be 'auto' or a list"]),
    "component twice": ({"components": ["q_proj", "q_proj"]}, ["components: 'q_proj' is listed twice"]),
    "component null": ({"components": [None]}, ["components: nothing must be text"]),
    "component a formula": ({"components": ["=cmd|' /C calc'!A0"]}, ["components: \"=cmd", "must be a name such as"]),
    "prefix missing": ({"components": ["q_proj", "k_proj"], "prefix_mapping": {"q_proj": "a.q_proj"}},
                       ["prefix_mapping has no entry for component 'k_proj'"]),
    "prefix a pattern": ({"prefix_mapping": {"q_proj": "attn.*.q"}}, ["prefix_mapping.q_proj: 'attn.*.q' must be a module path"]),
    "prefix with a trailing dot": ({"prefix_mapping": {"q_proj": "self_attn."}}, ["'self_attn.' must be a module path"]),
    "prefix null": ({"prefix_mapping": {"q_proj": None}}, ["prefix_mapping: 'q_proj': nothing must be text"]),
    # the models and their types
    "no models": ({"model_info": None}, ["model_info must list the models"]),
    "models as a mapping": ({"model_info": {"base": "x"}}, ["model_info must list the models"]),
    "a model as text": ({"model_info": [BASE, "./code"]}, ["model_info[1] must be a mapping with name and type"]),
    "a model without a name": ({"model_info": [BASE, {"type": "code"}]}, ["model_info[1].name must be text, got nothing"]),
    "only one model": ({"model_info": [BASE]}, ["only one model; a pair needs the base and at least one expert"]),
    "base type unknown": ({"base_model_type": "bse"}, ["base_model_type 'bse' is not a type", "base, code, math"]),
    "a type twice": ({"model_info": models(type="math")}, ["type 'math' is given twice"]),
    "types that differ in case only": ({"model_info": models(type="MATH")}, ["type 'math' is given twice ('MATH' before)"]),
    "an expert of the type base": ({"model_info": models(type="base")}, ["type 'base' is given twice"]),
    "the base as an expert": ({"model_info": models(name="./base")}, ["model './base' is listed twice"]),
    "an expert twice": ({"model_info": models(name="./math")}, ["model './math' is listed twice"]),
    "base name differs": ({"base_model_name": "./other"}, ["base_model_name './other' differs from the 'base' entry"]),
    "target unknown": ({"target_model_names": {"cod": "./code"}}, ["type 'cod' is not an expert", "did you mean 'code'?"]),
    "target is the base": ({"target_model_names": {"base": "./base"}}, ["names the base type 'base'; it lists experts only"]),
    "target of another name": ({"target_model_names": {"code": "./x"}}, ["'code' is './x' here but './code' in model_info"]),
    "targets as a list": ({"target_model_names": ["./code"]}, ["must map each expert's type to its model name"]),
    "no targets": ({"target_model_names": {}}, ["must map each expert's type"]),
    "revision a number": ({"model_info": models(revision=5)}, ["model_info[1].revision must be text (put it in quotes)"]),
    "home of nobody": ({"model_info": models(name="~no_such_user/m")}, ["'~no_such_user/m': no such user's home folder"]),
    # the data set
    "dataset unknown": ({"dataset": "gsm8"}, ["dataset 'gsm8' is unknown (known: gsm8k, mbpp); did you mean 'gsm8k'?"]),
    "dataset far from known": ({"dataset": "my text"}, ["for text of your own write dataset: {path: ..., text: ...}"]),
    "dataset a list": ({"dataset": ["mbpp"]}, ["dataset must be a name (gsm8k, mbpp) or a mapping"]),
    "dataset empty": ({"dataset": {}}, ["dataset needs a name or a path"]),
    "dataset null": ({"dataset": None}, ["dataset must be a name"]),
    "text and messages": ({"dataset": {"path": "x", "text": "{a}", "messages": "m"}}, ["not both"]),
    "path with a NUL": ({"dataset": {"path": "a\0b"}}, ["dataset.path must be text, got 'a\\x00b'"]),
    "split a bool": ({"dataset": {"name": "mbpp", "split": True}}, ["dataset.split must be text (YAML reads yes/no"]),
    "data of nobody": ({"dataset": {"path": "~no_such_user/x.jsonl"}}, ["no such user's home folder"]),
    # global parameters
    "parameter nan": ({"global_parameters": {"lambda": math.nan}}, ["global_parameters.lambda must be a finite number"]),
    "parameter inf in a list": ({"global_parameters": {"lambda": [1, math.inf]}}, ["global_parameters.lambda"]),
    "parameter null": ({"global_parameters": {"normalize": None}}, ["global_parameters.normalize"]),
    "parameter name a number": ({"global_parameters": {1: 2}}, ["global_parameters: key 1 must be text"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_key_value_and_remedy(tmp_path, case):
    changes, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        read_pair_config(write_config(tmp_path, changes))
    message = str(caught.value)
    for words in expected:
        assert words in message
    assert "\n" not in message  # one problem, one line


BAD_TYPES = [
    "a/b",
    "../../x",
    "..",
    ".hidden",
    "a b",
    "a\tb",
    LONG,
    "\u0441ode",
    "a=b",
    "-x",
    "_x",
    "co\u0301de",
    "a\nb",
    "=cmd",
]


@pytest.mark.parametrize("bad", BAD_TYPES)
def test_a_type_cannot_escape_into_paths(tmp_path, bad):
    message = refusal(tmp_path, model_info=models(type=bad))
    assert "model_info[1].type" in message
    assert len(message) < 500


def test_nul_and_traversal_in_a_model_name_stay_a_name(tmp_path):
    assert "model_info[1].name must be text" in refusal(tmp_path, model_info=models(name="a\0b"))
    assert read(tmp_path, model_info=models(name="../../x")).experts[0].name == "../../x"


def test_every_problem_is_told_at_once(tmp_path):
    message = refusal(tmp_path, nsamples=0, sparsity_ratio=2, dataset="x", componets=[], parity=1)
    assert "5 problems" in message
    for words in ("nsamples", "sparsity_ratio", "dataset 'x'", "did you mean 'components'?", "parity"):
        assert words in message


def test_very_many_problems_stay_a_message(tmp_path):
    message = refusal(tmp_path, **{f"key{i}": i for i in range(500)})
    assert "500 problems" in message and "and 470 more" in message
    assert len(message.splitlines()) == 32


def test_a_long_value_is_cut(tmp_path):
    assert len(refusal(tmp_path, nsamples="9" * 10_000)) < 300
    assert len(refusal(tmp_path, **{"k" * 900: 1})) < 500


ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11))


@pytest.mark.parametrize(
    "key", ["nsamples", "dataset", "components", "global_parameters", "model_info", "seed", "parity"]
)
def test_a_value_that_aliases_blow_up_is_neither_printed_nor_copied(tmp_path, key):
    start = time.perf_counter()
    value = "{k: *a10}" if key == "global_parameters" else "*a10"
    text = "".join(line for line in yaml.safe_dump(pair_settings()).splitlines(True) if not line.startswith(key))
    with pytest.raises(UserError) as caught:
        read_text(tmp_path, ALIASES + (text if key not in ("model_info", "dataset") else "") + f"{key}: {value}\n")
    assert key in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert time.perf_counter() - start < 5


def test_a_value_that_holds_itself(tmp_path):
    with pytest.raises(UserError, match=r"global_parameters\.k must be"):
        read_text(tmp_path, yaml.safe_dump(pair_settings()) + "global_parameters: &g\n  k: *g\n")


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    text = yaml.safe_dump(pair_settings())
    plain = read_text(tmp_path, text)
    (tmp_path / "pair.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_pair_config(tmp_path / "pair.yaml") == plain


def test_unknown_home_folder_of_the_config_itself():
    with pytest.raises(UserError, match="does not exist"):
        read_pair_config("~no_such_user/pair.yaml")


# --- fuzz: only a config or a UserError -------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
FULL = {
    **pair_settings(),
    "sparsity_ratio": 0.5,
    "components": ["q_proj"],
    "prefix_mapping": {"q_proj": "self_attn.q_proj"},
    "base_model_type": "base",
    "base_model_name": "./base",
    "target_model_names": {"code": "./code", "math": "./math"},
    "global_parameters": {"normalize": True},
    "parity": "reference",
    "seed": 1,
    "seqlen": 32,
    "guidance": "lewis",
    "calibration": {"math": {"path": "rows.jsonl", "text": "{question}"}},
    "evaluation": {"math": {"path": "rows.jsonl", "text": "{question} {answer}", "answer": "{answer}"}},
    "general": {"path": "rows.jsonl", "text": "{question}"},
    "search": {"trials": 8},
}


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@settings(max_examples=200, deadline=None)
@given(where=st.sampled_from(sorted(places(FULL), key=str)), junk=JUNK, drop=st.booleans())
def test_fuzz_any_value_replaced_or_dropped(tmp_path_factory, where, junk, drop):
    config = copy.deepcopy(FULL)
    if not where:
        config = junk
    else:
        inner = config
        for key in where[:-1]:
            inner = inner[key]
        if drop:
            del inner[where[-1]]
        else:
            inner[where[-1]] = junk
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8", errors="replace")
    try:
        json.dumps(read_pair_config(path).options(), allow_nan=False)
    except UserError as error:
        assert len(str(error)) < 5000


def test_fuzz_starts_from_a_valid_config_with_every_key(tmp_path):
    assert set(FULL) == set(CONFIG_KEYS)
    read(tmp_path, **FULL)
