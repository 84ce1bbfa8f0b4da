"""A slip in a recipe is told before mergekit is imported, in the words that mergekit's own schema would get.

python -m pytest tests/merging/test_quick_check.py
"""

import copy
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.merging.test_recipe_file import VALUES, places
from tests.tiny_merges import recipe, save_models, write_recipe
from utils.errors import UserError
from utils.merging.quick_check import check_quickly
from utils.merging.recipe_file import read_recipe


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with three tiny models, read only."""
    return save_models(tmp_path_factory.mktemp("models"))


def with_changes(room, edit):
    data = recipe(room)
    edit(data)
    return data


SLIPS = {
    "method": (lambda data: data.update(merge_method="tis"), "merge_method 'tis' is unknown; did you mean 'ties'"),
    "key": (lambda data: data.update(dtyp="float32"), "dtyp is unknown; did you mean 'dtype'"),
    "parameter": (
        lambda data: data["models"][1]["parameters"].update(wieght=1),
        r"models\[1\]\.parameters\.wieght is unknown to ties; did you mean 'weight'",
    ),
    "type": (lambda data: data.update(models=3), "models: Input should be a valid list, got 3"),
    "parameter type": (
        lambda data: data.update(parameters={"normalize": "perhaps"}),
        "parameters.normalize: .*boolean.*, got 'perhaps'",
    ),
    "place": (
        lambda data: data["models"][1]["parameters"].update(normalize=True),
        "normalize has no effect under one model",
    ),
    "dtype": (lambda data: data.update(dtype="bf16"), "dtype 'bf16' is unknown; did you mean 'bfloat16'"),
    "base": (lambda data: data.pop("base_model"), "base_model is missing"),
    "folder": (lambda data: data["models"].append({"model": "./nowhere"}), "model folder ./nowhere does not exist"),
    "donor": (lambda data: data.update(tokenizer_source="./nowhere"), "model folder ./nowhere does not exist"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_command_3_answers_without_the_heavy_libraries(room, tmp_path, run_command_line, slip):
    edit, _ = SLIPS[slip]
    path = write_recipe(tmp_path / "recipe.yaml", with_changes(room, edit))
    code = (
        "import sys; sys.argv = ['merger.py', '--merge_config', sys.argv[1], '--output_path', sys.argv[2]]\n"
        "from utils.errors import run_command; from utils.merger import main\n"
        "try: run_command(main)\n"
        "finally: print('loaded', sorted({'torch', 'transformers', 'mergekit', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    (tmp_path / "probe.py").write_text(code)
    done = run_command_line(tmp_path / "probe.py", path, tmp_path / "out", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, "loaded []\n"), done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("slip", SLIPS)
def test_each_slip_has_its_message(room, tmp_path, slip):
    edit, message = SLIPS[slip]
    path = write_recipe(tmp_path / "recipe.yaml", with_changes(room, edit))
    with pytest.raises(UserError, match=message):
        check_quickly(read_recipe(path))


def test_good_models_come_back_open_in_order(room, tmp_path):
    found = check_quickly(read_recipe(write_recipe(tmp_path / "recipe.yaml", recipe(room))))
    assert [checkpoint.folder for checkpoint in found] == [(room / name).resolve() for name in ("base", "code", "math")]
    assert all(checkpoint.tensors for checkpoint in found)


def test_hub_ids_and_adapters_wait_for_the_preflight(room, tmp_path):
    data = recipe(room)
    data["models"] += [{"model": "somebody/model"}, {"model": f"{room / 'math'}+{room / 'nowhere'}"}]
    read = read_recipe(write_recipe(tmp_path / "recipe.yaml", data))
    found = check_quickly(read, adapter_cache=tmp_path)
    assert [checkpoint.folder.name for checkpoint in found] == ["base", "code", "math"]
    with pytest.raises(UserError, match="Give --lora_merge_cache FOLDER"):
        check_quickly(read)


def test_a_damaged_model_is_told(room, tmp_path):
    shutil.copytree(room / "base", tmp_path / "base")
    with open(tmp_path / "base" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    data = recipe(room)
    data["models"].append({"model": str(tmp_path / "base")})
    with pytest.raises(UserError, match="truncated"):
        check_quickly(read_recipe(write_recipe(tmp_path / "recipe.yaml", data)))


def test_another_release_is_left_to_mergekit_itself(room, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.merging.quick_check.metadata.version", lambda _name: "0.1.6")
    path = write_recipe(tmp_path / "recipe.yaml", with_changes(room, SLIPS["parameter"][0]))
    assert check_quickly(read_recipe(path)) == []


def message_of(check, file):
    try:
        check(read_recipe(file))
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_it_says_what_mergekits_schema_says_and_refuses_nothing_else(room, tmp_path, data):
    """One value of a good recipe is replaced by anything."""
    from utils.merging.recipe_schema import parse_recipe

    changed = copy.deepcopy(recipe(room, "della", tokenizer={"source": "union", "tokens": {"x": {"source": "base"}}}))
    path = data.draw(st.sampled_from(sorted((one for one in places(changed) if one), key=str)))
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = data.draw(VALUES)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(changed).replace("NaN", ".nan").replace("Infinity", ".inf"))
    quick, thorough = message_of(check_quickly, file), message_of(parse_recipe, file)
    if quick and not quick.startswith("model "):
        assert quick == thorough
