"""A recipe that mergekit would take without a word and merge differently is refused with the nearest right word."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny_merges import recipe, write_recipe
from utils.errors import UserError
from utils.merging.recipe_file import read_recipe


def parsed(tmp_path, text_or_data):
    from utils.merging.recipe_schema import parse_recipe

    path = tmp_path / "recipe.yaml"
    if isinstance(text_or_data, str):
        path.write_text(text_or_data)
    else:
        write_recipe(path, text_or_data)
    return parse_recipe(read_recipe(path))


def two(parameters="{weight: 1}", rest="", method="ties"):
    models = f"[{{model: a}}, {{model: b, parameters: {parameters}}}]"
    return f"models: {models}\nmerge_method: {method}\nbase_model: a\n{rest}\n"


# --- without mergekit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("merge_method: [ties\n", "not valid YAML"),
        ("merge_method: !!python/object/apply:os.system ['id']\n", "not valid YAML|tag"),
        ("model_info: []\n", "is a pair config"),
        ("models: [{model: a}]\n", "merge_method must name a method"),
        ("merge_method: 3\nmodels: [{model: a}]\n", "merge_method must name a method"),
        ("merge_method: ties\n", "exactly one of models, slices and modules, got none"),
        ("merge_method: ties\nmodels: []\n", "got none"),
        ("merge_method: ties\nmodels: [{model: a}]\nslices: [{sources: []}]\n", "got models and slices"),
        (two("{weight: .nan}"), r"models\[1\]\.parameters\.weight: nan is not a finite number"),
        (two("{weight: 1, density: .inf}"), "inf is not a finite number"),
        (two("{weight: 1, density: -0.1}"), r"-0\.1 is outside \[0, 1\]"),
        (two("{weight: 1, density: 1.01}"), r"1\.01 is outside \[0, 1\]"),
        (two("{weight: 1, density: [{filter: q, value: 2}, {value: 1}]}"), "filter 'q': 2 is outside"),
        (two("{weight: 1, density: [0.5, 7]}"), "7 is outside"),
        (two("{weight: 1, density: half}"), "'half' is not a number"),
        (two("{weight: 1, density: [{filter: q}]}"), "has no value"),
        (two("{weight: 1, density: }"), "has no value"),
        (two("{weight: 1}", "parameters: {lambda: .nan}"), "parameters.lambda: nan"),
    ],
)
def test_outline_and_numbers(tmp_path, text, match):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=match):
        read_recipe(tmp_path / "recipe.yaml")


def test_all_problems_come_at_once(tmp_path):
    (tmp_path / "recipe.yaml").write_text("models: [{model: b, parameters: {weight: .nan, density: 3}}]\n")
    with pytest.raises(UserError, match="3 problems") as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert "merge_method" in str(caught.value) and "nan" in str(caught.value) and "3 is outside" in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read_recipe(tmp_path)


# --- against mergekit's schema ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (two(method="dare-ties"), "'dare-ties' is unknown; did you mean 'dare_ties'"),
        (two(method="TIES"), "did you mean 'ties'"),
        (two(method="quantum"), "known: arcee_fusion"),
        (two(rest="paramters: {normalize: true}"), "paramters is unknown; did you mean 'parameters'"),
        (two(rest="dtyp: float32"), "did you mean 'dtype'"),
        (two("{wieght: 1}"), r"models\[1\]\.parameters\.wieght is unknown to ties; did you mean 'weight'"),
        (two("{weight: 1, denisty: 0.5}"), "denisty is unknown to ties; did you mean 'density'"),
        (
            two("{weight: 1, density: [{filtr: q, value: 0.5}]}"),
            r"density\[0\]\.filtr is unknown; did you mean 'filter'",
        ),
        (two("{weight: 1, epsilon: 0.1}"), "epsilon is unknown to ties"),
        (two("{weight: 1, normalize: false}"), "normalize has no effect under one model .b.; move it"),
        (two("{weight: 1}", "parameters: {normalize: perhaps}"), "parameters.normalize: .*boolean"),
        (two(rest="tokenizer: {sorce: union}"), r"tokenizer\.sorce is unknown; did you mean 'source'"),
        (two(rest="tokenizer: {source: union, tokens: {x: {sorce: a}}}"), r"tokens\.x\.sorce is unknown"),
        (two(rest="tokenizer: {source: union}\ntokenizer_source: base"), "Cannot specify both"),
        (two(rest="dtype: bf16"), "dtype 'bf16' is unknown; did you mean 'bfloat16'"),
        (two(rest="dtype: int64"), "dtype 'int64' is unknown"),
        (two(rest="out_dtype: fp8"), "out_dtype 'fp8' is unknown"),
        (two(rest="chat_template: chatmll"), "chat_template 'chatmll' is neither auto"),
        ("models: [{model: a}, {model: b, parameters: {weight: 1}}]\nmerge_method: ties\n", "base_model is missing"),
        ("models: [{model: a}, {model: 5}]\nmerge_method: linear\n", "got 5"),
        ("models: [{model: a+b+c}]\nmerge_method: linear\n", "Can't parse a.b.c; write a folder whose name holds"),
        ("models: [{model: a@b@c}]\nmerge_method: linear\n", "multiple @"),
        ("models: [{modl: a}]\nmerge_method: linear\n", r"models\[0\]\.modl is unknown; did you mean 'model'"),
        ("slices: [{sources: [{model: a, layer_rang: [0, 1]}]}]\nmerge_method: passthrough\n", "layer_rang is unknown"),
    ],
)
def test_names_are_checked(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        parsed(tmp_path, text)


def test_known_names_come_from_mergekit_itself(tmp_path):
    """Every key of mergekit's schema and every parameter of every method is accepted where mergekit reads it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.base import ParameterScope

    from utils.merging.recipe_names import unknown_keys

    data = dict.fromkeys(MergeConfiguration.model_fields)
    assert not list(unknown_keys(MergeConfiguration, data, ""))
    for method in registered_methods():
        samples = {float: 0.5, str: "text"}
        values = {one.name: samples.get(one.value_type, 1) for one in method.spec.parameters}
        own = {one.name for one in method.spec.parameters if one.scope != ParameterScope.SHARED}
        models = [{"model": "a"}, {"model": "b", "parameters": {name: values[name] for name in own}}]
        shared = {name: value for name, value in values.items() if name not in own}
        data = {"models": models, "merge_method": method.spec.name, "base_model": "a", "parameters": shared}
        config, found, _ = parsed(tmp_path, data)
        assert found is method and len(config.referenced_models()) == 2


def test_golden_recipe_passes(golden):
    from utils.merging.recipe_schema import parse_recipe

    (path,) = (golden / "sparsity0").glob("*generated_ties*.yaml")
    config, method, warnings = parse_recipe(read_recipe(path))
    assert (method.spec.name, warnings) == ("ties", [])
    assert [str(model) for model in config.referenced_models()] == ["models/base", "models/math", "models/code"]


def test_parameters_without_effect_are_told(tmp_path):
    data = recipe(tmp_path, "task_arithmetic")
    data["models"][0]["parameters"] = {"weight": 1}
    data["models"][1]["parameters"]["density"] = 0.5
    _, _, warnings = parsed(tmp_path, data)
    assert any("models[0].parameters.weight has no effect: that model is the base" in text for text in warnings)
    assert any("density has no effect: task_arithmetic adds whole deltas" in text for text in warnings)
    assert len(warnings) == 2


def test_private_names_of_mergekit_that_we_use_exist():
    """mergekit may move these in a later release; then the pin in requirements.txt has to stop before it."""
    from mergekit.merge import _model_out_config, _set_chat_template

    assert callable(_model_out_config) and callable(_set_chat_template)


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_taken_or_refused_with_a_message(tmp_path, data):
    """One value of a good recipe is replaced by anything: a recipe results, or a `UserError`; never another error."""
    good = recipe(tmp_path, "della", tokenizer={"source": "union", "tokens": {"x": {"source": "base"}}})
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
        from utils.merging.recipe_schema import parse_recipe

        config, _, _ = parse_recipe(read_recipe(file))
    except UserError as error:
        assert str(error)
    else:
        assert config.referenced_models()
