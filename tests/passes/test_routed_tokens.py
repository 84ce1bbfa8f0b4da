"""Tokens of experts, counted in the three ways that architectures tell them, and what few of them are taken towards.

python -m pytest tests/passes/test_routed_tokens.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.plain_gradients import CPU, plain_squares
from tests.tiny_mixtures import save_mixtures
from utils.guidance.gram_mean.input_pass import Side as JointSide
from utils.guidance.gram_mean.joint_pass import joint_pass
from utils.guidance.saliency_budget.squared_gradients import Side, squares_pass
from utils.models.decoder import Component, Decoder, find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.passes.routed_tokens import FewTokens, count_tokens, take_towards_mean

SAMPLES = [[3, 5, 7, 9, 11, 2], [8, 1, 4], [6, 6, 2, 13, 50]]
EXPERTS = 4


@given(st.lists(st.lists(st.integers(0, EXPERTS), min_size=2, max_size=2, unique=True), max_size=9))
def test_all_ways_count_alike(chosen):
    """Number 4 is an expert without matrices."""
    wanted = [sum(expert in row for row in chosen) for expert in range(EXPERTS)]
    states = torch.rand(len(chosen), 3) + 0.1
    numbers = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    assert count_tokens([states, numbers, torch.rand(len(chosen), 2)], EXPERTS).tolist() == wanted
    if not chosen:
        return
    asked = torch.tensor([[expert in row for row in chosen] for expert in range(EXPERTS)])
    everywhere = (states[None] * asked[:, :, None]).reshape(-1, 3)
    assert count_tokens([everywhere], EXPERTS).tolist() == wanted
    in_order = torch.cat([states[own] for own in asked])
    assert count_tokens([in_order, wanted], EXPERTS).tolist() == wanted
    assert count_tokens([in_order, torch.tensor(wanted)], EXPERTS).tolist() == wanted


def test_calls_without_numbers_are_not_counted():
    assert count_tokens([torch.rand(7, 3)], EXPERTS) is None
    assert count_tokens([torch.rand(2, 5, 3)], EXPERTS) is None
    assert count_tokens([], EXPERTS) is None


@given(st.lists(st.integers(0, 60), min_size=2, max_size=5), st.integers(0, 40))
def test_few_tokens_are_taken_towards_the_mean(tokens, fewest):
    torch.manual_seed(sum(tokens))
    values = torch.rand(len(tokens), 3, 2, dtype=torch.float64)
    mean = sum(values) / len(values)
    wanted = [
        own if count >= fewest else (count * own + (fewest - count) * mean) / fewest
        for own, count in zip(values.clone(), tokens, strict=True)
    ]
    taken = take_towards_mean(values, torch.tensor(tokens), fewest)
    torch.testing.assert_close(taken, torch.stack(wanted))


def plain_counts(folder):
    """For each layer how many tokens each expert had, from the logits that transformers gives."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counts = torch.zeros(len(model.model.layers), EXPERTS)
    with torch.no_grad():
        for ids in SAMPLES:
            for layer, logits in enumerate(model(torch.tensor([ids]), output_router_logits=True).router_logits):
                counts[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=EXPERTS)
    return counts


def opened(folder):
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, torch.float32, trust_remote_code=False)
    layout = stored_layout(model, checkpoint)
    return find_decoder(model, None, {}, "test model"), StreamedWeights(layout, CPU, torch.float32), layout


def test_stacks_of_one_module_may_differ_in_length():
    """Of the last expert there is a matrix in one stack alone, which nothing uses."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(3, 4, 2)), nn.Parameter(torch.ones(2, 2, 2))

        def forward(self, states, chosen):
            return states

    block = nn.ModuleDict({"experts": Experts()})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    parts = tuple(Component(name, "experts", name) for name in ("gate_up_proj", "down_proj"))
    few = FewTokens(Decoder(model, model, model["layers"], "layers", parts, ((),)), 1, fewest=4)
    with few.counts.attached(0, block):
        block["experts"](torch.rand(5, 2), torch.tensor([[0, 1], [0, 2], [0, 2], [0, 2], [0, 2]]))
    for own in ([1, 0.25, 0], [1, 0.25]):
        values = torch.arange(len(own)).double().reshape(-1, 1)
        wanted = [share * value + (1 - share) * values.mean() for share, value in zip(own, values[:, 0], strict=True)]
        few.take(0, "experts", values)
        torch.testing.assert_close(values[:, 0], torch.stack(wanted))
    assert few.found == {(0, "experts"): [5, 1]}


@pytest.mark.parametrize("points", [(True, True), (False, True), (True, False)])
def test_squares_of_experts_with_few_tokens(points, tmp_path):
    folder = save_mixtures(tmp_path)
    folders, fewest = [folder / "base", folder / "math"], 9
    sides = [Side(*opened(one)[:2], SAMPLES if at else None) for one, at in zip(folders, points, strict=True)]
    oracles = [plain_squares(one, SAMPLES)[1] for one in folders]
    counts = sum(plain_counts(one) for one, at in zip(folders, points, strict=True) if at) / sum(points)
    assert ((counts > 0) & (counts < fewest)).any() and (counts > fewest).any()
    checked = 0
    with squares_pass(*sides, CPU, lambda layer: None, fewest_tokens=fewest) as both:
        for part in both.parts:
            name = sides[0].decoder.weight_name(part.layer, part.component)
            expected = sum(squares[name] for squares, at in zip(oracles, points, strict=True) if at)
            if part.component.is_stacked:
                checked += 1
                share = (counts[part.layer] / fewest).minimum(torch.ones(()))[:, None, None]
                expected = share * expected + (1 - share) * expected.mean(0, keepdim=True)
            torch.testing.assert_close(part.squares, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert checked == 2 * 4
    assert both.tokens == {(layer, "mlp.experts"): own.tolist() for layer, own in enumerate(counts)}


def test_vectors_of_experts_with_few_tokens(tmp_path):
    """Of a mixture stored apart, each expert's matrices with sums over axes of their own."""
    folder = save_mixtures(tmp_path)
    folders, fewest = [folder / "base", folder / "math"], 9
    opened_both = [opened(one) for one in folders]
    layout = opened_both[0][2]
    counts = sum(plain_counts(one) for one in folders) / 2
    squares = [plain_squares(one, SAMPLES)[1] for one in folders]
    sides = [JointSide(*one[:2], SAMPLES) for one in opened_both]
    more = {"split": layout.pieces, "fewest_tokens": fewest, "by_expert": layout.by_expert}
    with joint_pass(sides, CPU, lambda layer: None, **more) as both:
        axes = {part.layer: part.axes for part in both.parts}
    for layer, own in enumerate(counts):
        whole = sum(one[f"model.layers.{layer}.mlp.experts.gate_up_proj"] for one in squares).double()
        share = (own / fewest).minimum(torch.ones(()))[:, None, None]
        whole = share * whole + (1 - share) * whole.mean(0, keepdim=True)
        for part, matrices in zip(("gate_proj", "up_proj"), whole.chunk(2, dim=1), strict=True):
            for expert, matrix in enumerate(matrices):
                rows, columns = axes[layer][f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"]
                torch.testing.assert_close(rows, matrix.sum(1), rtol=1e-3, atol=1e-9)
                torch.testing.assert_close(columns, matrix.sum(0) / matrix.sum(), rtol=1e-3, atol=1e-6)
    assert both.tokens == {(layer, "mlp.experts"): own.tolist() for layer, own in enumerate(counts)}
