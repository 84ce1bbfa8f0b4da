"""Squared gradients of both models' linear parts, against plain autograd with all gradients held."""

import itertools

import pytest
import torch

from tests.plain_gradients import CPU, plain_squares
from tests.selected import few
from tests.tiny_checkpoints import LAYERS, VOCABULARY, save_tiny
from utils.guidance.saliency_budget.squared_gradients import Side, squares_pass
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.passes.squared_gradients import SquaredGradients

SAMPLES = [[2 + (7 * i + 3 * j) % (VOCABULARY - 2) for i in range(length)] for j, length in enumerate((17, 2, 23))]


def side(folder, samples):
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, torch.float32, trust_remote_code=False)
    decoder = find_decoder(model, None, {}, "test model")
    return Side(decoder, StreamedWeights(stored_layout(model, checkpoint), CPU, torch.float32), samples)


def layers_and_parts(one):
    return [(layer, part) for layer in range(LAYERS) for part in one.decoder.components]


POINTS = BASE, EXPERT, BOTH = (True, False), (False, True), (True, True)


@pytest.mark.parametrize(
    ("family", "points"),
    few(
        itertools.product(("llama", "gemma3", "phi3", "gpt2"), POINTS),
        ("llama", BASE),
        ("phi3", EXPERT),
        ("gemma3", BOTH),
        ("gpt2", BOTH),
    ),
)
def test_squares_and_weights_are_those_of_plain_autograd(family, points, tmp_path):
    folders = [save_tiny(family, tmp_path / name, seed=seed) for seed, name in enumerate(("base", "expert"))]
    oracles = [plain_squares(folder, SAMPLES) for folder in folders]
    sides = [side(folder, SAMPLES if at else None) for folder, at in zip(folders, points, strict=True)]
    seen, blocks = [], []
    with squares_pass(*sides, CPU, blocks.append) as both:
        assert [len(losses) for losses in both.losses] == [3 * at for at in points]
        for part in both.parts:
            name = sides[0].decoder.weight_name(part.layer, part.component)
            seen.append((part.layer, part.component.name))
            for weight, (parameters, _) in zip((part.base, part.expert), oracles, strict=True):
                assert torch.equal(weight, parameters[name])
            expected = sum(squares[name] for (_, squares), at in zip(oracles, points, strict=True) if at)
            assert part.squares.dtype == torch.float32 and part.squares.shape == part.base.shape
            scale = float(expected.max())
            torch.testing.assert_close(part.squares, expected, rtol=1e-3, atol=1e-6 * scale)
    names = {sides[0].decoder.weight_name(layer, part) for layer, part in layers_and_parts(sides[0])}
    rest = {name: value for name, value in oracles[0][0].items() if name not in names}
    assert both.others.keys() == rest.keys() and {value.dim() for value in rest.values()} == {1, 2}
    for name, axes in both.others.items():
        expected = sum(squares[name] for (_, squares), at in zip(oracles, points, strict=True) if at).double()
        wanted = (expected,) if expected.dim() == 1 else (expected.sum(1), expected.sum(0) / expected.sum())
        for axis, right in zip(axes, wanted, strict=True):
            assert axis.dtype == torch.float64
            torch.testing.assert_close(axis, right, rtol=1e-3, atol=1e-6 * float(right.max()))
    components = [part.name for part in sides[0].decoder.components]
    assert seen == [(layer, name) for layer in reversed(range(LAYERS)) for name in components]
    assert len(blocks) == 2 * LAYERS * sum(points)
    assert all(value.is_meta for one in sides for value in one.decoder.model.parameters())


def test_leaving_early_leaves_the_models_as_they_were(tmp_path):
    folders = [save_tiny("llama", tmp_path / name, seed=seed) for seed, name in enumerate(("base", "expert"))]
    for points in ((True, False), (True, True)):
        sides = [side(folder, SAMPLES if at else None) for folder, at in zip(folders, points, strict=True)]
        with pytest.raises(RuntimeError, match="planned"), squares_pass(*sides, CPU, lambda layer: None) as both:
            next(both.parts)
            raise RuntimeError("planned")
        assert all(value.is_meta for one in sides for value in one.decoder.model.parameters())


def test_a_head_that_only_the_expert_has_of_its_own(tmp_path):
    """Base tied, expert not: the base adds to the embedding alone, and so is it told by the name that each part has."""
    folders = [
        save_tiny("qwen2", tmp_path / "base", tie_word_embeddings=True),
        save_tiny("qwen2", tmp_path / "expert", 1),
    ]
    oracles = [plain_squares(folder, SAMPLES)[1] for folder in folders]
    with squares_pass(*(side(folder, SAMPLES) for folder in folders), CPU, lambda layer: None) as both:
        assert sum(1 for _ in both.parts) == LAYERS * 7
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in oracles[0] and head in oracles[1]
    rows = oracles[0][embedding].sum(1) + oracles[1][embedding].sum(1)
    torch.testing.assert_close(both.others[embedding][0].float(), rows, rtol=1e-3, atol=1e-6 * float(rows.max()))
    rows = oracles[1][head].sum(1)
    torch.testing.assert_close(both.others[head][0].float(), rows, rtol=1e-3, atol=1e-6 * float(rows.max()))


def test_a_vocabulary_that_the_expert_has_extended(tmp_path):
    folders = [save_tiny("llama", tmp_path / name, vocab_size=VOCABULARY + more) for name, more in (("b", 0), ("e", 5))]
    oracles = [plain_squares(folder, SAMPLES)[1] for folder in folders]
    with squares_pass(*(side(folder, SAMPLES) for folder in folders), CPU, lambda layer: None) as both:
        assert sum(1 for _ in both.parts) == LAYERS * 7
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = oracles[1][name].sum(1)
        rows[:VOCABULARY] += oracles[0][name].sum(1)
        torch.testing.assert_close(both.others[name][0].float(), rows, rtol=1e-3, atol=1e-6 * float(rows.max()))


def test_half_precision_gradients_are_squared_in_float32():
    observer = SquaredGradients(frozenset({"w"}))
    gradient = torch.tensor([1e-5, 3.0], dtype=torch.float16)  # its square is 0 in float16
    for sample in range(2):
        observer.gradient("w", torch.zeros(2), gradient.clone(), sample)
    assert observer.wants("w") and not observer.wants("v")
    assert torch.equal(observer.take("w", torch.zeros(2)), 2 * gradient.float() ** 2)
    assert torch.equal(observer.take("w", torch.zeros(2)), torch.zeros(2)) and not observer.sums
    observer = SquaredGradients(frozenset(), frozenset({"w", "v"}))
    assert observer.wants("w") and not observer.wants("x")
    observer.gradient("w", torch.zeros(2), gradient, 0)
    ((found,),) = observer.take_factors("w", torch.zeros(2)).values()
    assert torch.equal(found, gradient.float().double() ** 2 // 2**-149 * 2**-149)  # float32's square
    assert [axis.tolist() for axis in observer.take_factors("v", torch.zeros(2, 1))["v"]] == [[0, 0], [0]]


def test_a_parameter_in_pieces_has_vectors_for_each():
    def rows(name, value):
        return {f"{name}.{place}": row for place, row in enumerate(value)}

    observer = SquaredGradients(frozenset(), frozenset({"biases"}), rows)
    gradients = [torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[4.0, 0.0], [1.0, 1.0]])]
    for sample, gradient in enumerate(gradients):
        observer.gradient("biases", gradient, gradient, sample)
    found = observer.take_factors("biases", torch.zeros(3, 2))
    assert {name: axis.tolist() for name, (axis,) in found.items()} == {
        "biases.0": [17, 4],
        "biases.1": [1, 10],
        "biases.2": [0, 0],
    }
