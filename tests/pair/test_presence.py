"""What a pair config names is looked for before any library loads.

python -m pytest tests/pair/test_presence.py
"""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.refusals import refused
from tests.tiny_pairs import write_config
from utils.pair.config import read_pair_config
from utils.pair.presence import refuse_missing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A pair's folder with its models as folders without weights, and its text."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "code", "math"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


def check(folder, **changes):
    refuse_missing(read_pair_config(write_config(folder, changes)))


def test_what_is_there_passes_and_hub_names_are_not_looked_for(folder):
    check(folder)
    check(folder, dataset="gsm8k", model_info=[{"name": "org/a", "type": "base"}, {"name": "org/b", "type": "x"}])


def test_all_that_is_missing_is_said_at_once(folder):
    shutil.rmtree(folder / "code")
    shutil.rmtree(folder / "math")
    (folder / "math").write_text("")
    (folder / "base/config.json").unlink()
    (folder / "rows.jsonl").unlink()
    with refused("model-missing") as caught:
        check(folder)
    assert caught.value.codes == ("model-no-config", "model-missing", "model-is-file", "text-missing")
    assert f"model folder ./code does not exist (looked in {folder})" in str(caught.value)


def test_texts_of_experts_are_looked_for_and_those_for_later_commands_are_not(folder):
    check(folder, evaluation={"code": {"path": "none.jsonl"}}, general={"path": "none.jsonl"})
    with refused("text-missing"):
        check(folder, calibration={"code": {"path": "none.jsonl"}})
    config = read_pair_config(write_config(folder, {"general": {"path": "none.jsonl"}}))
    with refused("text-missing"):
        refuse_missing(config, [config.general.source])


def test_the_adapter_of_a_model_is_looked_for_too(folder):
    models = [{"name": "./base", "type": "base"}, {"name": "./base+./adapter", "type": "code"}]
    with refused("model-missing", "./adapter"):
        check(folder, model_info=models)
    (folder / "adapter").mkdir()
    check(folder, model_info=models)
    check(folder, model_info=[models[0], {"name": "org/base+org/adapter", "type": "code"}])


def test_no_library_loads_for_it(folder):
    shutil.rmtree(folder / "code")
    script = (
        "import sys; from utils.errors import UserError; from utils.pair.config import read_pair_config\n"
        "from utils.pair.presence import refuse_missing\n"
        "try: refuse_missing(read_pair_config(sys.argv[1]))\n"
        "except UserError as error: print(error.code)\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'pandas', 'datasets', 'huggingface_hub'} & set(sys.modules)))"
    )
    path = write_config(folder)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n") == ["model-missing", "", ""]
