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
from tests.refusals import refused
from tests.tiny_pairs import pair_settings, write_config
from utils.errors import UserError
from utils.pair.config import ModelEntry, PairConfig, PairSettings, read_pair_config
from utils.pair.source import CalibrationSource


def read(folder: Path, **changes) -> PairConfig:
    return read_pair_config(write_config(folder, changes))


def refusal(code: str, folder: Path, **changes) -> str:
    with refused(code) as caught:
        read(folder, **changes)
    assert str(caught.value).startswith(f"pair config {folder / 'pair.yaml'}: ")
    return str(caught.value)


def read_text(folder: Path, text: str) -> PairConfig:
    (folder / "pair.yaml").write_text(text)
    return read_pair_config(folder / "pair.yaml")


def test_guidance_is_a_name(tmp_path):
    assert read(tmp_path).guidance is None
    assert read(tmp_path, guidance="sens_merging").guidance == "sens_merging"
    refusal("config-wrong-type", tmp_path, guidance=3)


def test_a_list_of_mistakes_in_one_key_is_reported_at_once(tmp_path):
    said = refusal("config-other-target", tmp_path, target_model_names={"code": "./x", "math": "./y", "base": "./z"})
    assert "3 problems" in said


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
    assert "chat" not in options["dataset"]
    chat = {"name": "gsm8k", "chat": [{"role": "user", "content": "{question}"}]}
    with_chat = read(tmp_path, dataset=chat).options()
    assert json.loads(json.dumps(with_chat)) == with_chat and with_chat["dataset"]["chat"] == chat["chat"]
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
    "unknown key": ({"nsample": 3}, "config-unknown-key"),
    "far from any key": ({"zzz": 3}, "config-unknown-key"),
    "unknown dataset key": ({"dataset": {"name": "mbpp", "splt": "x"}}, "config-unknown-key"),
    "unknown model key": ({"model_info": models(typ="x")}, "config-unknown-key"),
    # wrong types
    "nsamples as text": ({"nsamples": "15"}, "config-wrong-type"),
    "nsamples 0": ({"nsamples": 0}, "config-out-of-range"),
    "nsamples huge": ({"nsamples": 10**9}, "config-out-of-range"),
    "seed negative": ({"seed": -1}, "config-out-of-range"),
    "seqlen 1": ({"dataset": {"name": "mbpp", "seqlen": 1}}, "config-out-of-range"),
    "components as text": ({"components": "q_proj"}, "config-wrong-type"),
    "type that YAML reads as false": ({"model_info": models(type=False)}, "config-wrong-type"),
    "base type that is a bool": ({"base_model_type": True}, "config-wrong-type"),
    "parity other": ({"parity": "yes"}, "config-unknown-value"),
    "parity true": ({"parity": True}, "config-unknown-value"),
    "prefix_mapping a list": ({"prefix_mapping": ["a"]}, "config-wrong-type"),
    "global_parameters a list": ({"global_parameters": [1]}, "config-wrong-type"),
    # sparsity_ratio
    "sparsity in percent": ({"sparsity_ratio": 50}, "config-out-of-range"),
    "sparsity negative": ({"sparsity_ratio": -0.1}, "config-out-of-range"),
    "sparsity 1": ({"sparsity_ratio": 1.0}, "config-out-of-range"),
    # components and prefixes
    "no components": ({"components": []}, "config-wrong-type"),
    "component twice": ({"components": ["q_proj", "q_proj"]}, "config-component-twice"),
    "component a formula": ({"components": ["=cmd|' /C calc'!A0"]}, "config-bad-path"),
    "prefix missing": ({"components": ["q_proj", "k_proj"], "prefix_mapping": {"q_proj": "a.q_proj"}}, "config-no-prefix"),
    "prefix a pattern": ({"prefix_mapping": {"q_proj": "attn.*.q"}}, "config-bad-path"),
    "prefix with a trailing dot": ({"prefix_mapping": {"q_proj": "self_attn."}}, "config-bad-path"),
    # the models and their types
    "no models": ({"model_info": None}, "config-no-models"),
    "models as a mapping": ({"model_info": {"base": "x"}}, "config-no-models"),
    "a model as text": ({"model_info": [BASE, "./code"]}, "config-wrong-type"),
    "a model without a name": ({"model_info": [BASE, {"type": "code"}]}, "config-missing-key"),
    "only one model": ({"model_info": [BASE]}, "config-one-model"),
    "base type unknown": ({"base_model_type": "bse"}, "config-unknown-base"),
    "a type twice": ({"model_info": models(type="math")}, "config-type-twice"),
    "types that differ in case only": ({"model_info": models(type="MATH")}, "config-type-twice"),
    "the base as an expert": ({"model_info": models(name="./base")}, "config-model-twice"),
    "an expert twice": ({"model_info": models(name="./math")}, "config-model-twice"),
    "base name differs": ({"base_model_name": "./other"}, "config-other-base"),
    "target unknown": ({"target_model_names": {"cod": "./code"}}, "config-unknown-expert"),
    "target is the base": ({"target_model_names": {"base": "./base"}}, "config-base-as-expert"),
    "target of another name": ({"target_model_names": {"code": "./x"}}, "config-other-target"),
    "targets as a list": ({"target_model_names": ["./code"]}, "config-wrong-type"),
    "no targets": ({"target_model_names": {}}, "config-no-targets"),
    "revision a number": ({"model_info": models(revision=5)}, "config-wrong-type"),
    "home of nobody": ({"model_info": models(name="~no_such_user/m")}, "config-no-home"),
    # the data set
    "dataset unknown": ({"dataset": "gsm8"}, "config-unknown-dataset"),
    "dataset far from known": ({"dataset": "my text"}, "config-unknown-dataset"),
    "dataset a list": ({"dataset": ["mbpp"]}, "config-wrong-type"),
    "dataset empty": ({"dataset": {}}, "config-no-text"),
    "text and messages": ({"dataset": {"path": "x", "text": "{a}", "messages": "m"}}, "config-two-texts"),
    "text and chat": ({"dataset": {"name": "mbpp", "text": "{a}", "chat": [{"role": "user", "content": "{a}"}]}}, "config-two-texts"),
    "chat without messages": ({"dataset": {"name": "mbpp", "chat": []}}, "config-no-turns"),
    "chat of no role": ({"dataset": {"name": "mbpp", "chat": [{"content": "{a}"}]}}, "config-missing-key"),
    "chat with an unknown key": ({"dataset": {"name": "mbpp", "chat": [{"rol": "x", "role": "user", "content": "{a}"}]}}, "config-unknown-key"),
    "path with a NUL": ({"dataset": {"path": "a\0b"}}, "config-bad-text"),
    "split a bool": ({"dataset": {"name": "mbpp", "split": True}}, "config-wrong-type"),
    "data of nobody": ({"dataset": {"path": "~no_such_user/x.jsonl"}}, "config-no-home"),
    # global parameters
    "parameter nan": ({"global_parameters": {"lambda": math.nan}}, "config-bad-parameter"),
    "parameter inf in a list": ({"global_parameters": {"lambda": [1, math.inf]}}, "config-bad-parameter"),
    "parameter null": ({"global_parameters": {"normalize": None}}, "config-bad-parameter"),
    "parameter name a number": ({"global_parameters": {1: 2}}, "config-wrong-type"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_key_and_code(tmp_path, case):
    changes, code = REFUSED[case]
    with refused(code) as caught:
        read(tmp_path, **changes)
    message = str(caught.value)
    assert list(changes)[-1] in message
    assert "\n" not in message  # one problem, one line


WORDING = {
    "components as text": "components must be 'auto' or a list of names such as q_proj, got 'q_proj'",
    "parity true": "parity must be 'reference' or left out, got True",
    "sparsity in percent": "sparsity_ratio must be below 1, got 50; 50% is 0.5",
    "component twice": "components: 'q_proj' is listed twice",
    "prefix missing": "prefix_mapping has no entry for component 'k_proj'; add one",
    "prefix a pattern": "prefix_mapping.q_proj must be a module path inside a block, such as q_proj, mlp.c_proj or "
    "self_attn.q_proj, got 'attn.*.q'",
    "no models": "model_info must list the models: one {name, type} for the base and one per expert",
    "only one model": "model_info names only one model; a pair needs the base and at least one expert",
    "base type unknown": "base_model_type 'bse' is not a type in model_info (types there: base, code, math)",
    "types that differ in case only": "model_info: type 'math' is given twice ('MATH' before)",
    "the base as an expert": "model_info: model './base' is listed twice; each model is measured once",
    "base name differs": "base_model_name './other' differs from the 'base' entry of model_info, './base'",
    "target unknown": "target_model_names: type 'cod' is not an expert in model_info; did you mean 'code'?",
    "target is the base": "target_model_names names the base type 'base'; it lists experts only",
    "target of another name": "target_model_names: 'code' is './x' here but './code' in model_info; the model that is "
    "measured must be the one that is merged",
    "home of nobody": "model_info[1].name '~no_such_user/m': no such user's home folder; write the full path",
    "dataset unknown": "dataset.name 'gsm8' is unknown (known: gsm8k, mbpp); did you mean 'gsm8k'?",
    "dataset far from known": "dataset.name 'my text' is unknown (known: gsm8k, mbpp); for text of your own give a "
    "mapping: {path: ..., text: ...}",
    "dataset a list": "dataset must be a name (gsm8k, mbpp) or a mapping, got ['mbpp']",
    "dataset empty": "dataset needs a name or a path",
    "text and messages": "dataset: give one of text (a template), messages (a chat column) and chat (messages made of "
    "columns)",
    "chat without messages": "dataset.chat must list messages such as {role: user, content: '{question}'}",
    "parameter nan": "global_parameters.lambda must be a finite number, true, false, text, or a list of these, got nan",
}


@pytest.mark.parametrize("case", WORDING)
def test_what_a_message_says(tmp_path, case):
    with refused(REFUSED[case][1]) as caught:
        read(tmp_path, **REFUSED[case][0])
    assert str(caught.value) == f"pair config {tmp_path / 'pair.yaml'}: {WORDING[case]}"


def test_a_key_that_yaml_reads_as_true(tmp_path):
    with refused("config-unknown-key") as caught:
        read_pair_config(write_config(tmp_path, {True: 3}))
    assert "unknown key True; known keys: model_info, " in str(caught.value)


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
    with pytest.raises(UserError) as caught:
        read(tmp_path, model_info=models(type=bad))
    message = str(caught.value)
    assert set(caught.value.codes) <= {"config-bad-type", "config-bad-text"}
    assert "model_info[1].type" in message
    assert len(message) < 500


def test_nul_and_traversal_in_a_model_name_stay_a_name(tmp_path):
    refusal("config-bad-text", tmp_path, model_info=models(name="a\0b"))
    assert read(tmp_path, model_info=models(name="../../x")).experts[0].name == "../../x"


def test_every_problem_is_reported_at_once(tmp_path):
    message = refusal(
        "config-unknown-value", tmp_path, nsamples=0, sparsity_ratio=2, dataset="x", componets=[], parity=1
    )
    assert "5 problems" in message
    for words in ("nsamples", "sparsity_ratio", "dataset.name 'x'", "did you mean 'components'?", "parity"):
        assert words in message


def test_very_many_problems_stay_a_message(tmp_path):
    message = refusal("config-unknown-key", tmp_path, **{f"key{i}": i for i in range(500)})
    assert "500 problems" in message and "and 470 more" in message
    assert len(message.splitlines()) == 32


def test_a_long_value_is_cut(tmp_path):
    assert len(refusal("config-wrong-type", tmp_path, nsamples="9" * 10_000)) < 300
    assert len(refusal("config-unknown-key", tmp_path, **{"k" * 900: 1})) < 500


ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11))


@pytest.mark.parametrize(
    "key", ["nsamples", "dataset", "components", "global_parameters", "model_info", "seed", "parity"]
)
def test_a_value_that_aliases_blow_up_is_neither_printed_nor_copied(tmp_path, key):
    start = time.process_time()
    value = "{k: *a10}" if key == "global_parameters" else "*a10"
    text = "".join(line for line in yaml.safe_dump(pair_settings()).splitlines(True) if not line.startswith(key))
    with pytest.raises(UserError) as caught:
        read_text(tmp_path, ALIASES + (text if key not in ("model_info", "dataset") else "") + f"{key}: {value}\n")
    assert caught.value.code == "yaml-too-many"
    assert len(str(caught.value)) < 500
    assert time.process_time() - start < 5


def test_a_value_that_holds_itself(tmp_path):
    with refused("yaml-recursive"):
        read_text(tmp_path, yaml.safe_dump(pair_settings()) + "global_parameters: &g\n  k: *g\n")


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    text = yaml.safe_dump(pair_settings())
    plain = read_text(tmp_path, text)
    (tmp_path / "pair.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_pair_config(tmp_path / "pair.yaml") == plain


def test_unknown_home_folder_of_the_config_itself():
    with refused("file-missing"):
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
    "search": {
        "merge_method": "ties",
        "guidance": ["uniform", "lewis"],
        "lambda": [0.2, 1],
        "density": 0.5,
        "depth_groups": 3,
        "options": {"saliency_budget": {"mask": ["magnitude", "saliency"]}},
        "objective_weights": {"math": 2.0},
    },
}


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@settings(max_examples=80, deadline=None)
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
    assert set(FULL) == {field.name for field in dataclasses.fields(PairSettings)}
    read(tmp_path, **FULL)
