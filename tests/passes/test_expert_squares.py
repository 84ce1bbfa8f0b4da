"""Squares of experts' gradients that wait one matrix at a time, against sums over whole stacks."""

import pytest
import torch

from utils.passes.expert_squares import ExpertSquares
from utils.passes.mixed_stacks import between, differ, with_changes
from utils.passes.routed_tokens import take_towards_mean
from utils.passes.tensor_store import TensorStore

CPU, NAMES, SHAPE = torch.device("cpu"), frozenset({"up", "down"}), (4, 3, 5)


def summed(squares, gradients):
    """What is given back of gradients by sample and expert, where one expert has none."""
    for own in gradients:
        for expert in (0, 1, 3):
            squares.add("up", expert, own[expert])
    return squares


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("fewest", [0, 6])
def test_each_is_that_of_the_whole_stack(on_host, fewest):
    gradients = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    whole = gradients.square().sum(0)
    whole[2] = 0
    tokens = torch.tensor([9, 2, 0, 6])
    with summed(ExpertSquares(NAMES, TensorStore(CPU, on_host=on_host)), gradients) as squares:
        found = [
            *squares.each("up", torch.empty(SHAPE, device="meta"), (tokens / fewest).clamp(max=1) if fewest else None)
        ]
    torch.testing.assert_close(torch.stack(found), take_towards_mean(whole, tokens, fewest))


def test_the_next_block_takes_the_places_of_the_one_before(tmp_path):
    gradients, like = torch.ones(2, *SHAPE), torch.empty(SHAPE)
    with ExpertSquares(NAMES, store := TensorStore(CPU, path=tmp_path / "file")) as squares:
        ends = []
        for block in range(3):
            summed(squares, gradients * block)
            assert [float(one.mean()) for one in squares.each("up", like)] == [
                2.0 * block**2 * (e != 2) for e in range(4)
            ]
            ends.append(store.sync())
            squares.forget()
            assert not any(one.any() for one in squares.each("up", like))
    assert ends == [3 * 4 * 15] * 3


def test_sums_of_stacks_are_those_of_their_matrices():
    first, second, third = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    apart = []
    for one in (first, second, third):
        stack = torch.nn.Parameter(torch.empty(SHAPE, device="meta"), requires_grad=False)
        stack.matrix_of = one.__getitem__
        apart.append(stack)
    for whole, made in (
        (between(first, second, 0.3), between(apart[0], apart[1], 0.3)),
        (with_changes(first, [second, third], [0.5, 2.0]), with_changes(apart[0], apart[1:], [0.5, 2.0])),
    ):
        assert made.is_meta and made.shape == whole.shape
        assert all(torch.equal(made.matrix_of(expert), whole[expert]) for expert in range(4))
    assert differ(*apart[:2]) and not differ(apart[0], apart[0])
