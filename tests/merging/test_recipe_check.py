"""A mistake in a recipe, which mergekit would pass over in silence, is one message before anything heavy is imported."""

import copy
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.refusals import refusal_code, refused
from tests.tiny_merges import recipe, write_recipe
from utils.errors import UserError
from utils.merging.inputs import find_models
from utils.merging.recipe_check import CheckedRecipe, check_recipe
from utils.merging.recipe_file import read_recipe


def checked(tmp_path, text_or_data) -> CheckedRecipe:
    path = tmp_path / "recipe.yaml"
    if isinstance(text_or_data, str):
        path.write_text(text_or_data)
    else:
        write_recipe(path, text_or_data)
    return check_recipe(read_recipe(path))


def two(parameters="{weight: 1}", rest="", method="ties"):
    models = f"[{{model: a}}, {{model: b, parameters: {parameters}}}]"
    return f"models: {models}\nmerge_method: {method}\nbase_model: a\n{rest}\n"


MISTAKES = [
    (two(method="dare-ties"), "recipe-unknown-method", "merge_method 'dare-ties' is unknown; did you mean 'dare_ties'"),
    (two(method="TIES"), "recipe-unknown-method", "did you mean 'ties'"),
    (two(method="quantum"), "recipe-unknown-method", "known: arcee_fusion"),
    (two(rest="paramters: {normalize: true}"), "recipe-unknown-key", "'paramters'; did you mean 'parameters'"),
    (two(rest="dtyp: float32"), "recipe-unknown-key", "did you mean 'dtype'"),
    (
        two("{wieght: 1}"),
        "recipe-unknown-parameter",
        "models[1].parameters.wieght is unknown to ties; did you mean 'weight'",
    ),
    (two("{weight: 1, epsilon: 0.1}"), "recipe-unknown-parameter", "epsilon is unknown to ties"),
    (
        two("{weight: 1, density: [{filtr: q, value: 0.5}]}"),
        "recipe-unknown-key",
        "density[0].filtr is unknown; did you mean 'filter'",
    ),
    (
        two("{weight: 1, density: [{filter: q, value: 0.5, x: 1}]}"),
        "recipe-unknown-key",
        "density[0].x is unknown; known keys: filter, value",
    ),
    (two("{weight: 1, normalize: false}"), "recipe-shared-parameter", "has no effect under one model; move it"),
    (two(rest="parameters: {normalize: perhaps}"), "recipe-wrong-type", "must be true or false, got 'perhaps'"),
    (two("{weight: .nan}"), "recipe-not-finite", "models[1].parameters.weight: nan is not a finite number"),
    (two("{weight: 1, density: .inf}"), "recipe-not-finite", "inf"),
    (two("{weight: 1, density: -0.1}"), "recipe-out-of-range", "-0.1 is outside [0, 1]"),
    (two("{weight: 1, density: [{filter: q, value: 2}, {value: 1}]}"), "recipe-out-of-range", "(filter 'q'): 2 is"),
    (two("{weight: 1, density: [0.5, 7]}"), "recipe-out-of-range", "density[1]: 7 is outside"),
    (two("{weight: 1, density: half}"), "recipe-wrong-type", "must be a number, got 'half'"),
    (two("{weight: 1, density: [{filter: q}]}"), "recipe-no-value", "has no value"),
    (two("{weight: 1, density: }"), "recipe-no-value", "has no value"),
    (two("{weight: 1, density: []}"), "recipe-no-value", "has no value"),
    (two("{weight: 1, density: [{filter: q, value: []}, {value: 1}]}"), "recipe-no-value", "has no value"),
    (two("{weight: 1, density: true}"), "recipe-wrong-type", "must be a number, got True"),
    (two("{weight: 1, density: 1e400}"), "recipe-not-finite", "is not a finite number"),
    (two("{weight: 1, density: [0.5, {value: 1}]}"), "recipe-wrong-type", "not both"),
    (two("{weight: [[1]]}"), "recipe-wrong-type", "must be a number"),
    (two(rest="parameters: {lambda: .nan}"), "recipe-not-finite", "parameters.lambda: nan"),
    (two(rest="tokenizer: {sorce: union}"), "recipe-unknown-key", "did you mean 'source'"),
    (two(rest="tokenizer: {tokens: {x: {sorce: a}}}"), "recipe-unknown-key", "did you mean 'source'"),
    (two(rest="tokenizer: {source: union}\ntokenizer_source: base"), "recipe-two-tokenizers", "exclude each other"),
    (two(rest="tokenizer: {pad_to_multiple_of: 0}"), "recipe-bad-multiple", "0 must be 1 or more"),
    (two(rest="tokenizer: {pad_to_multiple_of: -8}"), "recipe-bad-multiple", "-8 must be 1 or more"),
    *(
        (
            f"slices: [{{sources: [{{model: a, layer_range: {span}}}]}}]\nmerge_method: passthrough\n",
            "recipe-bad-layer-range",
            span,
        )
        for span in ("[1, 0]", "[1, 1]", "[-1, 2]", "[0, 1000000000]")
    ),
    (two(rest="dtype: bf16"), "recipe-unknown-dtype", "dtype 'bf16' is unknown; did you mean 'bfloat16'"),
    (two(rest="out_dtype: fp8"), "recipe-unknown-dtype", "out_dtype 'fp8' is unknown"),
    ("models: [{model: a}, {model: b, parameters: {weight: 1}}]\nmerge_method: ties\n", "recipe-no-base", "is missing"),
    ("models: [{model: a}, {model: 5}]\nmerge_method: linear\n", "recipe-wrong-type", "got 5"),
    ("models: 3\nmerge_method: linear\n", "recipe-wrong-type", "models must be a list, got 3"),
    ("models: [{model: a+b+c}]\nmerge_method: linear\n", "recipe-bad-model", "{model: {path: ...}}"),
    ("models: [{model: a@b@c}]\nmerge_method: linear\n", "recipe-bad-model", "{model: {path: ...}}"),
    ("models: [{modl: a}]\nmerge_method: linear\n", "recipe-unknown-key", "did you mean 'model'"),
    (
        "slices: [{sources: [{model: a, layer_rang: [0, 1]}]}]\nmerge_method: passthrough\n",
        "recipe-unknown-key",
        "rang",
    ),
]


@pytest.mark.parametrize(("text", "code", "words"), MISTAKES)
def test_a_mistake_is_refused_with_the_nearest_right_word(tmp_path, text, code, words):
    with refused(code) as caught:
        checked(tmp_path, text)
    assert words in str(caught.value)


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        checked(tmp_path, two("{weight: .nan, density: 3}", "dtype: bf16\nparamters: {}"))
    assert set(caught.value.codes) == {
        "recipe-not-finite",
        "recipe-out-of-range",
        "recipe-unknown-dtype",
        "recipe-unknown-key",
    }


def test_models_and_donors_in_the_order_of_the_recipe(tmp_path, golden):
    (path,) = (golden / "sparsity0").glob("*generated_ties*.yaml")
    found = check_recipe(read_recipe(path))
    assert [str(model) for model in found.models] == ["models/base", "models/math", "models/code"]
    assert found.method.name == "ties" and not found.donors and not list(found.idle_parameters())
    tokens = "{x: {source: {kind: model_token, model: d, token: y}}, z: {source: {kind: zero}}, q: {source: e@v2}}"
    found = checked(tmp_path, two(rest=f"tokenizer: {{source: c, tokens: {tokens}}}"))
    assert [str(model) for model in found.donors] == ["c", "d", "e@v2"]
    assert not checked(tmp_path, two(rest="tokenizer_source: base")).donors


@pytest.mark.parametrize("rest", ["tokenizer_source: base", "tokenizer: {source: union, tokens: {x: {source: base}}}"])
def test_a_model_may_be_called_like_a_word_of_the_tokenizer(tmp_path, rest):
    from utils.merging.configuration import configuration

    found = checked(
        tmp_path, two(rest=rest).replace("model: a", "model: base").replace("base_model: a", "base_model: base")
    )
    config = configuration(found, {name: (tmp_path / str(name), None) for name in (*found.models, *found.donors)})
    assert [model.model.path for model in config.referenced_models()] == [str(tmp_path / "base"), str(tmp_path / "b")]
    if config.tokenizer:
        assert config.tokenizer.source == "union"
        assert config.tokenizer.tokens["x"].source.model.path == str(tmp_path / "base")
    else:
        assert config.tokenizer_source == "base"


def test_parameters_without_effect_are_said(tmp_path):
    data = recipe(tmp_path, "task_arithmetic")
    data["models"][0]["parameters"] = {"weight": 1}
    data["models"][1]["parameters"]["density"] = 0.5
    sentences = list(checked(tmp_path, data).idle_parameters())
    assert len(sentences) == 2
    assert sentences[0] == "models[0].parameters.weight has no effect: that model is the base"
    assert "density has no effect: task_arithmetic adds whole deltas" in sentences[1]


# --- before the heavy libraries ---------------------------------------------------------------------------------------


LATE = {
    "method": (lambda data: data.update(merge_method="tis"), "recipe-unknown-method"),
    "folder": (lambda data: data["models"].append({"model": "./nowhere"}), "model-missing"),
    "donor": (lambda data: data.update(tokenizer_source="./nowhere"), "model-missing"),
    "twice": (lambda data: data["models"].append(dict(data["models"][1])), "recipe-model-twice"),
}


@pytest.mark.parametrize("mistake", LATE)
def test_command_3_answers_without_the_heavy_libraries(llamas, tmp_path, run_command_line, mistake):
    edit, code = LATE[mistake]
    data = recipe(llamas)
    edit(data)
    path = write_recipe(tmp_path / "recipe.yaml", data)
    program = (
        "import sys; sys.argv = ['merger.py', '--merge_config', sys.argv[1], '--output_path', sys.argv[2]]\n"
        "from utils.errors import run_command; from utils.merger import main\n"
        "try: run_command(main)\n"
        "finally: print('loaded', sorted({'torch', 'transformers', 'mergekit', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    (tmp_path / "probe.py").write_text(program)
    done = run_command_line(tmp_path / "probe.py", path, tmp_path / "out", PYTHONPATH=str(ROOT))
    assert refusal_code(done) == code and done.stdout == "loaded []\n"
    assert not (tmp_path / "out").exists()


def test_local_models_come_back_open_and_others_wait(llamas, tmp_path):
    found = find_models(checked(tmp_path, recipe(llamas)))
    folders = [checkpoint.folder for checkpoint in found.checkpoints.values()]
    assert folders == [(llamas / name).resolve() for name in ("base", "code", "math")]
    assert all(checkpoint.tensors for checkpoint in found.checkpoints.values())
    data = recipe(llamas)
    data["models"].append({"model": f"{llamas / 'math'}+{llamas / 'base'}"})
    assert len(find_models(checked(tmp_path, data)).checkpoints) == 3
    data["models"].append({"model": f"{llamas / 'math'}+{llamas / 'nowhere'}"})
    with refused("model-missing"):
        find_models(checked(tmp_path, data))


def test_a_damaged_model_is_refused(llamas, tmp_path):
    shutil.copytree(llamas / "base", tmp_path / "base")
    with open(tmp_path / "base" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    data = recipe(llamas)
    data["models"].append({"model": str(tmp_path / "base")})
    with refused("weights-truncated"):
        find_models(checked(tmp_path, data))


# --- anything at all --------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.sampled_from(["", "ties", "a+b", "1e-3"]),
)
KEYS = st.sampled_from(
    ["model", "models", "parameters", "weight", "density", "filter", "value", "sources", "x", "dtype"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


def places(node, here=()):
    """Every path to a value inside nested lists and mappings."""
    yield here
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*here, key))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_taken_by_mergekit_too_or_refused_with_a_message(llamas, tmp_path, data):
    """One value of a good recipe is replaced by anything: mergekit's value results, or a `UserError`; never another."""
    from utils.merging.configuration import configuration

    good = recipe(llamas, "della", tokenizer={"source": "union", "tokens": {"x": {"source": str(llamas / "base")}}})
    path = data.draw(st.sampled_from(sorted(places(good), key=str)))
    value = data.draw(VALUES)
    changed = copy.deepcopy(good)
    node = changed
    for key in path[:-1]:
        node = node[key]
    if path:
        node[path[-1]] = value
    else:
        changed = value
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(changed).replace("NaN", ".nan").replace("Infinity", ".inf"))
    try:
        found = check_recipe(read_recipe(file))
        config = configuration(found, dict.fromkeys((*found.models, *found.donors), (tmp_path / "x", None)))
    except UserError as error:
        assert str(error) and all(error.codes)
    else:
        assert config.referenced_models()
