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
from utils.guidance import own_text
from utils.guidance.method import guidance_methods
from utils.guidance.text_gain import text_gain
from utils.passes.sample_pass import SamplePass

METHODS = tuple(guidance_methods())
THERE_AND_BACK = ("gram_mean", "saliency_budget", "sens_merging")


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


CASES = [(name, {}) for name in METHODS] + [("saliency_budget", {"gradient_at": point}) for point in ("base", "expert")]


@pytest.mark.parametrize(("method", "more"), CASES)
def test_the_text_of_another_expert_is_refused_with_both_losses(method, more, swapped):
    with refused("text-without-gain") as caught:
        measure_here(method, "dfs", accept_useless_text=False, **more)
    assert {path.name for path in Path("dfs").iterdir()} == {".measuring.part"}
    results = {path.name for path in Path("dfs").glob(".measuring.part/*/*/")}
    assert results == {"code+gain", "math+gain"} or method == "lewis"  # no expert is measured before all are asked
    assert all(f"({name}): its loss on its own text" in str(caught.value) for name in ("code", "math"))
    said = re.search(r"code.*?loss on its own text is (\S+), the base's (\S+) \(", str(caught.value))
    rows = [json.loads(line)["text"] for line in Path("math.jsonl").read_text().splitlines()]
    measure_here("lewis", "lewis")
    samples = json.loads(Path("lewis/manifest.json").read_text())["samples"]
    chosen = next(one["rows"] for one in samples if one["path"].endswith("math.jsonl"))
    texts = [rows[place] for place in chosen]
    expected = [plain_losses(name, texts) for name in ("code", "base")]
    assert [float(one) for one in said.groups()] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_can_be_accepted_and_is_said_then(method, swapped, capsys):
    measure_here(method, "dfs", accept_useless_text=True)
    said = capsys.readouterr().err
    assert "code has no sure gain over the base on its own text" in said and "accepted by --accept_useless_text" in said


@pytest.mark.parametrize("method", METHODS)
def test_accepting_it_goes_on_with_what_is_finished_and_not_the_other_way_round(method, swapped, monkeypatch):
    """The refusal's own remedy throws nothing away; what was accepted once is refused again without the flag."""
    with refused("text-without-gain"):
        measure_here(method, "dfs", accept_useless_text=False)
    before = [path.name for path in Path("dfs").glob(".measuring.part/*")]

    def publish_in_vain(*given, **more):
        raise full()

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(measure, "publish_files", publish_in_vain)
        measure_here(method, "dfs", accept_useless_text=True)
    after = [path.name for path in Path("dfs").glob(".measuring.part/*")]
    assert len(after) == 1 and before == after
    with refused("text-without-gain"):
        measure_here(method, "dfs", accept_useless_text=False)


@pytest.fixture
def ways_forward(monkeypatch):
    """Counts a sample's ways through a block that are computed on the way there."""
    counted, forward = [], SamplePass.forward

    def counting(self, layer):
        counted.append(layer)
        return forward(self, layer)

    monkeypatch.setattr(SamplePass, "forward", counting)
    return counted


@pytest.mark.parametrize("method", THERE_AND_BACK)
def test_the_way_there_is_computed_once_unless_it_does_not_fit_on_the_disk(
    method, pair, ways_forward, monkeypatch, capsys
):
    measure_here(method, "once")
    once, both = len(ways_forward), sorted(path.name for path in Path("once").iterdir())
    assert once and "computed once more" not in capsys.readouterr().out
    monkeypatch.setattr(own_text, "free_bytes", lambda folder: (0, folder))
    measure_here(method, "twice")
    assert len(ways_forward) == once + 2 * once
    assert "computed once more" in capsys.readouterr().out
    for name in both:
        assert name == "manifest.json" or Path("once", name).read_bytes() == Path("twice", name).read_bytes()


def test_lewis_asks_only_where_text_is_an_experts_own(pair, swapped, capsys):
    settings = yaml.safe_load(Path("pair.yaml").read_text())
    code = settings["calibration"]["code"]
    without = {key: value for key, value in settings.items() if key != "calibration"} | {"dataset": code}
    for name, config in (("shared", settings | {"calibration": {"code": code, "math": code}}), ("set", without)):
        write_config(pair, config)
        measure_here("lewis", name, accept_useless_text=False)
        assert "own text" not in capsys.readouterr().err
    write_config(pair, settings | {"parity": "reference"})
    measure_here("lewis", "parity", accept_useless_text=False)
    assert "is not asked: pads are attended" in capsys.readouterr().out
    write_config(pair, settings | {"sparsity_ratio": 0.5})
    with refused("text-without-gain"):
        measure_here("lewis", "pruned", accept_useless_text=False)


def test_what_lewis_measures_has_the_bits_of_a_pass_that_does_not_ask(pair, monkeypatch):
    measure_here("lewis", "asked")
    monkeypatch.setattr("utils.guidance.lewis.measure.is_scored", lambda *given: False)
    monkeypatch.setattr("utils.guidance.lewis.measure.gains_of_passes", lambda *given: {})
    measure_here("lewis", "plain")
    for path in Path("plain").glob("*.csv"):
        assert path.read_bytes() == Path("asked", path.name).read_bytes()


def test_a_gain_of_one_sample_is_accepted_and_doubted():
    assert len(own_text.accepted_doubts({"code": text_gain([5], [2.0], [1.0])})) == 1
    assert not own_text.accepted_doubts({"code": text_gain([5, 5, 5], [2.0, 2.1, 2.2], [1.0, 1.1, 1.2])})
