"""What is prepared before any weight is read: equal tokenizers share their work, unequal ones never do.

python -m pytest tests/passes/test_subjects.py
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.refusals import refused
from tests.tiny_pairs import write_config
from utils.models.decoder import Component
from utils.models.tokenizer import tokenizer_digest
from utils.pair.calibration import choose_samples
from utils.pair.config import read_pair_config
from utils.passes.preparation import Precision, model_doubts, prepare_subjects
from utils.passes.subjects import require_own_tensors

CONFIG = {"model_type": "llama"}


def prepared(pair: Path, dtype: str = "auto", **changes):
    config = read_pair_config(write_config(pair, changes))
    samples = {source: choose_samples(source, config.nsamples) for source in config.texts}
    return prepare_subjects(config, samples, Precision(torch.device("cpu"), dtype, None), False)


def test_subjects_stand_in_the_order_of_the_config(pair):
    subjects = prepared(pair)
    assert [subject.entry.type for subject in subjects] == ["base", "code", "math"]
    for subject in subjects:
        (text,) = subject.texts.values()
        assert text.tokens == sum(map(len, text.encoded)) > 0
        assert all(parameter.is_meta for parameter in subject.decoder.model.parameters())
    assert model_doubts(subjects[0], subjects[1]) == []


@pytest.mark.parametrize(
    ("capabilities", "dtype", "changes", "computed"),
    [
        ({"avx2": True}, "auto", {}, torch.float32),
        ({"avx512_bf16": True}, "auto", {}, torch.bfloat16),
        ({"avx2": True}, "auto", {"parity": "reference"}, torch.bfloat16),
        ({"avx2": True}, "bfloat16", {}, torch.bfloat16),
        ({"avx512_bf16": True}, "float32", {}, torch.float32),
    ],
)
def test_what_a_checkpoint_in_bfloat16_is_computed_in(pair, monkeypatch, capabilities, dtype, changes, computed):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert {subject.dtype for subject in prepared(pair, dtype, **changes)} == {computed}


def test_a_component_that_is_stored_in_one_with_others_is_refused():
    component = Component("gate_up_proj", "mlp.text_moe.experts", "gate_up_proj")
    decoder = SimpleNamespace(
        blocks=[None, None],
        components_of=lambda layer: [component] if layer else [],
        weight_name=lambda layer, one: f"layers.{layer}.{one.own_path}",
    )
    entry = SimpleNamespace(name="base")
    apart, together = (SimpleNamespace(can_split=lambda name, can=can: can) for can in (True, False))
    require_own_tensors(SimpleNamespace(entry=entry, decoder=decoder, layout=apart))
    with refused("model-unsupported", "mlp.text_moe.experts.gate_up_proj of block 1"):
        require_own_tensors(SimpleNamespace(entry=entry, decoder=decoder, layout=together))


def test_parity_counts_the_pads(pair):
    subjects = prepared(pair, parity="reference")
    (text,) = subjects[0].texts.values()
    assert text.tokens == 4 * 32


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "x.tiktoken", "tokenization_x.py",
     "chat_template.jinja", "additional_chat_templates/rag.jinja"],
)  # fmt: skip
def test_any_tokenizer_file_distinguishes_tokenizers(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    digests = {tokenizer_digest(tmp_path, CONFIG)}
    for content in ("one", "two"):
        path.write_text(content)
        digests.add(tokenizer_digest(tmp_path, CONFIG))
    assert len(digests) == 3


def test_weights_and_settings_of_generation_do_not(tmp_path):
    before = tokenizer_digest(tmp_path, CONFIG)
    for name in ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    assert tokenizer_digest(tmp_path, CONFIG) == before
    assert tokenizer_digest(tmp_path, {"model_type": "gpt2"}) != before


def test_equal_tokenizers_are_read_once(pair, monkeypatch):
    from transformers import AutoTokenizer

    read = []
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda folder, **more: (read.append(folder), load(folder, **more))[1]
    )
    prepared(pair)
    assert len(read) == 1
