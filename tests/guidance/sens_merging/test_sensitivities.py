"""Sensitivities of blocks against plain autograd over the whole model, all gradients held.

python -m pytest tests/guidance/sens_merging/test_sensitivities.py
"""

import pytest
import torch

from tests.plain_gradients import CPU, opened, plain_gradients, token_lists
from tests.tiny_checkpoints import LAYERS, save_any
from utils.guidance.sens_merging.sensitivities import SensitivityObserver, block_layers
from utils.passes.block_gradients import observe_gradients


def expected(folder, samples, layers=LAYERS, dtype=torch.float32):
    """The formula by autograd: per block, the sum over samples and parameters of |parameter * gradient|."""
    model, _, gradients = plain_gradients(folder, samples, dtype)
    parameters = dict(model.named_parameters())
    sums = [0.0] * layers
    for (name, _), gradient in gradients.items():
        places = [int(part) for part in name.split(".") if part.isdigit()]
        if places:
            sums[places[0]] += float((parameters[name].detach().double() * gradient.double()).abs().sum())
    return sums


def measured(folder, samples, dtype=torch.float32, at_once=None):
    decoder, weights = opened(folder, dtype)
    observer = SensitivityObserver(decoder, CPU)
    if at_once:
        observer._AT_ONCE = at_once
    observe_gradients(decoder, weights, samples, observer, CPU)
    return observer.sums


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3", "gpt2", "qwen2", "qwen3_moe"])
def test_sums_equal_plain_autograd(family, tmp_path):
    save_any(family, tmp_path)
    samples = token_lists()
    found = measured(tmp_path, samples)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.tolist(), expected(tmp_path, samples), rtol=2e-5, atol=0)


def test_samples_do_not_cancel_each_other(tmp_path):
    """Per-sample gradients: the sum over samples of absolute products, not the absolute product of a sum."""
    save_any("llama", tmp_path)
    samples = token_lists()
    alone = sum(measured(tmp_path, [ids]) for ids in samples)
    torch.testing.assert_close(measured(tmp_path, samples), alone, rtol=1e-6, atol=0)


def test_large_tensors_are_taken_in_pieces(tmp_path):
    save_any("gpt2", tmp_path)
    samples = token_lists((7,))
    torch.testing.assert_close(measured(tmp_path, samples, at_once=100), measured(tmp_path, samples), rtol=1e-6, atol=0)


def test_products_of_half_precision_are_not_rounded_to_it():
    class OneBlock:
        blocks_path = "blocks"
        blocks = torch.nn.ModuleList([torch.nn.Linear(300, 1, bias=False)])

    observer = SensitivityObserver(OneBlock(), CPU)
    generator = torch.Generator().manual_seed(0)
    value, slope = (torch.randn(1, 300, generator=generator).bfloat16() for _ in range(2))
    kept = slope.clone()
    observer.gradient("blocks.0.weight", value, slope, 0)
    assert float(observer.sums) == pytest.approx(float((value.double() * kept.double()).abs().sum()), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])  # untied; tied
def test_what_lies_outside_the_blocks_is_summed_by_parameter(family, tmp_path):
    save_any(family, tmp_path)
    samples = token_lists()
    decoder, weights = opened(tmp_path)
    observer = SensitivityObserver(decoder, CPU)
    observe_gradients(decoder, weights, samples, observer, CPU, outside=True)
    model, _, gradients = plain_gradients(tmp_path, samples)
    parameters = dict(model.named_parameters())
    found = {name: 0.0 for name, _ in gradients if name not in block_layers(decoder)}
    for (name, _), gradient in gradients.items():
        if name in found:
            found[name] += float((parameters[name].detach().double() * gradient.double()).abs().sum())
    assert observer.outside.keys() == found.keys() and len(found) >= 2
    for name, expected in found.items():
        assert float(observer.outside[name]) == pytest.approx(expected, rel=2e-5), name
    assert set(block_layers(decoder).values()) == set(range(LAYERS))
