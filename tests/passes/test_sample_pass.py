"""Models that do something around their blocks: it is differentiated exactly, or refused."""

import weakref
from collections import UserDict
from collections.abc import MutableMapping
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.refusals import refused
from utils.passes.flows import stops
from utils.passes.hand_over import handed_over
from utils.passes.sample_pass import SamplePass
from utils.passes.tensor_store import TensorStore

VOCABULARY, WIDTH, BLOCKS = 11, 6, 3
IDS = [3, 1, 4, 1, 5, 9]
CPU = torch.device("cpu")


class Block(nn.Module):
    """Mixes positions and channels; may return a second tensor for later blocks."""

    def __init__(self, pair):
        super().__init__()
        self.inner, self.gate = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.pair = pair

    def forward(self, hidden, extra=None, other=None):
        mixed = hidden.cumsum(1) * self.gate + (0 if extra is None else extra[0])
        if isinstance(
            other, MutableMapping
        ):  # the last block reads what the first has left, and what the second made of it
            mixed = (
                mixed + other["table"][0] + sum(part for key, pair in other.items() if key != "table" for part in pair)
            )
            other["seen"] = torch.sin(mixed), torch.cos(mixed)
            other.setdefault("first", (mixed * mixed,))
        out = hidden + torch.tanh(self.inner(mixed))
        if self.pair == "list":
            return [out, mixed]
        return (out, torch.sin(mixed), None) if self.pair else out


class Model(nn.Module):
    """A causal language model; `way` says what happens around its blocks."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, pair = way, {"pair": True, "list": "list"}.get(way, False)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(Block(pair) for _ in range(BLOCKS))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = first = self.embed(input_ids)
        extra, skipped = None, 0
        shared = UserDict(table=(self.scale * 0.5, None)) if self.way == "shared" else [hidden]
        for place, block in enumerate(self.blocks):
            if self.way in ("shared", "state"):
                hidden = block(hidden, other=shared)
            elif self.way == "pair":
                hidden, seen, _ = block(hidden, extra=None if extra is None else (extra, 1))
                extra = seen if extra is None else extra  # the first block's second output goes to every later block
            elif self.way == "first":
                hidden = block(hidden, extra=(first * 0.5,))  # the embedding goes to every block
            elif self.way == "parameter":
                hidden = block(hidden, extra=(self.scale,))  # a parameter from outside goes to every block
            elif self.way == "list":
                hidden = block(hidden)[0]
            else:
                hidden = block(hidden)
            if self.way == "between" and place + 1 < BLOCKS:
                hidden = torch.exp(hidden * 0.1) * self.scale
                skipped = skipped + hidden  # the head sees what lies between the blocks, too
            if self.way == "cut":
                hidden = hidden.detach()
        return (self.head((hidden + skipped) * self.scale), hidden)


def plain(model):
    logits = model(torch.tensor([IDS]))[0]
    loss = nn.functional.cross_entropy(logits[0, :-1], torch.tensor(IDS[1:]))
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def by_blocks(model):
    """All gradients and the loss, one block after the other, back from the last."""
    found = {}

    def keep(name, parameter, gradient):
        assert name not in found
        found[name] = gradient

    with stops(model.blocks):
        sample = SamplePass(model, IDS, CPU, TensorStore(CPU))
        for layer in range(BLOCKS):
            sample.forward(layer)
        loss = sample.score()
    around = {name: value for name, value in model.named_parameters() if not name.startswith("blocks.")}
    for layer in reversed(range(BLOCKS)):
        own = {f"blocks.{layer}.{name}": value for name, value in model.blocks[layer].named_parameters()}
        with handed_over(own, keep):
            sample.backward(layer, keep_output=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    with stops(model.blocks), handed_over(around, keep):
        sample.outside(list(around.values()))
    assert all(parameter.grad is None for parameter in model.parameters())
    return loss, found


@pytest.mark.parametrize("way", ["plain", "between", "pair", "first", "parameter", "shared", "list"])
def test_what_lies_around_the_blocks_is_differentiated(way):
    model = Model(way)
    loss, gradients = by_blocks(model)
    expected_loss, expected = plain(model)
    assert loss == pytest.approx(expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("synced", [False, True])
def test_nothing_stays_in_the_hosts_memory_behind_the_way_back(tmp_path, synced):
    model, store = Model("plain"), TensorStore(CPU, path=tmp_path / "states", on_host=True)
    with stops(model.blocks):
        sample = SamplePass(model, IDS, CPU, store)
        for layer in range(BLOCKS):
            sample.forward(layer)
        sample.score()
    states = [weakref.ref(one.stored.host) for call in sample.calls for one in call.outputs()]
    if synced:
        store.sync()
    for layer in reversed(range(BLOCKS)):
        sample.backward(layer, keep_output=False)
    if not synced:
        store.close()
    assert len(states) == BLOCKS and all(state() is None for state in states)
    assert len(sample.waiting) == BLOCKS  # which says where in the file they are


def test_state_handed_from_block_to_block_is_refused():
    with refused("model-unsupported", "hands its blocks a list"):
        by_blocks(Model("state"))


def test_a_model_that_computes_without_gradients_is_refused():
    class Frozen(Model):
        @torch.no_grad()
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with refused("model-unsupported", "without gradients"):
        by_blocks(Frozen("plain"))


def test_a_part_that_cuts_the_graph_gives_what_autograd_gives():
    model = Model("cut")
    own = dict(model.blocks[0].named_parameters())
    with stops(model.blocks):
        sample = SamplePass(model, IDS, CPU, TensorStore(CPU))
        for layer in range(BLOCKS):
            sample.forward(layer)
        sample.score()
    with handed_over(own, lambda *given: pytest.fail("no gradient reaches the blocks")):
        for layer in reversed(range(BLOCKS)):
            sample.backward(layer, keep_output=False)


def test_gradients_are_let_go_of_when_a_hand_over_fails():
    module = SimpleNamespace(weight=nn.Parameter(torch.ones(2)))

    def fail(name, parameter, gradient):
        raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"), handed_over({"weight": module.weight}, fail):
        (module.weight * 2).sum().backward()
    assert module.weight.grad is None and not module.weight._post_accumulate_grad_hooks
