"""Every guidance that measures experts on text of their own refuses experts that gain nothing on it.

python -m pytest tests/guidance/test_own_text.py
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.faulty import full
from tests.refusals import refused
from tests.tiny_experts import save_experts
from tests.tiny_pairs import write_config
from tests.tiny_recipes import measure_here
from utils.commands import measure
from utils.guidance.method import guidance_methods

METHODS = tuple(name for name, method in guidance_methods().items() if method.text_per_task)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def swapped(pair):
    settings = yaml.safe_load(Path("pair.yaml").read_text())
    code, math = (settings["calibration"][name] for name in ("code", "math"))
    write_config(pair, {**settings, "calibration": {"code": math, "math": code}})


def plain_losses(model, texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
    )
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        losses = [float(loaded(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in ids]
    return sum(losses) / sum(row.shape[1] - 1 for row in ids)


def test_they_are_all_but_lewis():
    assert {*guidance_methods()} - {*METHODS} == {"lewis"}


CASES = [(name, {}) for name in METHODS] + [("saliency_budget", {"gradient_at": point}) for point in ("base", "expert")]


@pytest.mark.parametrize(("method", "more"), CASES)
def test_the_text_of_another_expert_is_refused_with_both_losses(method, more, swapped):
    with refused("text-without-gain") as caught:
        measure_here(method, "dfs", accept_useless_text=False, **more)
    assert not Path("dfs").exists() or not list(Path("dfs").iterdir())
    said = re.search(r"code.*?loss on its own text is (\S+), the base's (\S+) \(", str(caught.value))
    rows = [json.loads(line)["text"] for line in Path("math.jsonl").read_text().splitlines()]
    measure_here("lewis", "lewis")
    samples = json.loads(Path("lewis/manifest.json").read_text())["samples"]
    chosen = next(one["rows"] for one in samples if one["path"].endswith("math.jsonl"))
    texts = [rows[place] for place in chosen]
    expected = [plain_losses(name, texts) for name in ("code", "base")]
    assert [float(one) for one in said.groups()] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("method", ["saliency_budget", "sens_merging", "submodule_linearity"])
def test_it_can_be_accepted_and_is_said_then(method, swapped, capsys):
    measure_here(method, "dfs", accept_useless_text=True)
    said = capsys.readouterr().err
    assert "code has no sure gain over the base on its own text" in said and "accepted by --accept_useless_text" in said


@pytest.mark.parametrize("method", METHODS)
def test_accepting_it_goes_on_with_what_is_finished_and_not_the_other_way_round(method, pair, monkeypatch):
    """The refusal's own remedy throws nothing away; what was accepted once is refused again without the flag."""
    settings = yaml.safe_load(Path("pair.yaml").read_text())
    code = settings["calibration"]["code"]
    write_config(pair, {**settings, "calibration": {"code": code, "math": code}})
    with refused("text-without-gain"):
        measure_here(method, "dfs", accept_useless_text=False)
    before = [path.name for path in Path("dfs").glob(".measuring.part/*")]

    def publish_in_vain(*given, **more):
        raise full()

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(measure, "publish_files", publish_in_vain)
        measure_here(method, "dfs", accept_useless_text=True)
    after = [path.name for path in Path("dfs").glob(".measuring.part/*")]
    assert len(after) == 1 and before in ([], after)
    assert before or method not in ("gram_mean", "saliency_budget", "sens_merging")
    with refused("text-without-gain"):
        measure_here(method, "dfs", accept_useless_text=False)
