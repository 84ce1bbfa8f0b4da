"""Whose tokens keep their experts with another model's routers, against logits that transformers itself gives.

python -m pytest tests/passes/test_routing.py
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.tiny_mixtures import save_mixtures
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.pair.batches import micro_batches
from utils.passes.block_gradients import observe_gradients
from utils.passes.block_runner import run_blocks
from utils.passes.routing import RouterComparison, VisitorWithRouters, agreement
from utils.passes.second_moments import SecondMoments

CPU = torch.device("cpu")
SAMPLES = [[3, 5, 7, 9, 11, 2], [8, 1, 4], [6, 6, 2, 13, 50]]


class Watcher:
    """A visitor that has hooks of its own on the routers, as norms of all linear parts have."""

    rewrites = False

    def __init__(self, decoder):
        self.paths = decoder.linear_paths

    def observing(self, layer, block):
        self.moments = SecondMoments(self.paths[layer])
        return self.moments.attached(block)

    def begin(self, batch):
        self.moments.begin(batch)

    def finish(self, layer, block):
        tokens = sum(map(len, SAMPLES))
        assert all(seen in (0, tokens) for path, seen in self.moments.tokens.items() if path not in self.moments.unfit)


def opened(folder, dtype=torch.float32):
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, dtype, False)
    layout = stored_layout(model, checkpoint)
    decoder = find_decoder(model, None, {}, "it")
    return decoder, StreamedWeights(layout, CPU, dtype)


def compared(folder, at_once=4096):
    decoder, weights = opened(folder / "math")
    routers = RouterComparison(decoder, opened(folder / "base")[1])
    batches = micro_batches(SAMPLES, at_once, 0)
    run_blocks(decoder, weights, batches, VisitorWithRouters(Watcher(decoder), routers), CPU)
    return routers.found()


def plain(folder, routers="gate"):
    """For each layer the experts [tokens, 2] of the model, and those of the base's router on the model's own inputs."""
    model, base = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("math", "base")
    )
    own, other = [], []
    for layer, (block, theirs) in enumerate(zip(model.model.layers, base.model.layers, strict=True)):
        gate, weight = getattr(block.mlp, routers), getattr(theirs.mlp, routers).weight
        seen = []
        handle = gate.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        logits = []
        for ids in SAMPLES:
            with torch.no_grad():
                logits.append(model(torch.tensor([ids]), output_router_logits=True).router_logits[layer])
        handle.remove()
        own.append(torch.cat(logits).topk(2).indices)
        other.append((torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]) @ weight.T).topk(2).indices)
    return own, other


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6))
def test_sets_of_experts_are_compared_whatever_their_order(seed, chosen, tokens):
    drawn = torch.Generator().manual_seed(seed)
    own, other = (torch.stack([torch.randperm(5, generator=drawn)[:chosen] for _ in range(tokens)]) for _ in range(2))
    same, common = agreement(own, other)
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(own, other, strict=True)]
    assert int(same) == sum(a == b for a, b in pairs)
    assert int(common) == sum(len(a & b) for a, b in pairs)
    assert [int(one) for one in agreement(own, own.flip(1))] == [tokens, tokens * chosen]
    real = torch.arange(tokens) < tokens // 2
    assert agreement(own, other, real) == agreement(own[real], other[real])


@pytest.mark.parametrize("at_once", [4096, 6])
def test_shares_are_those_of_a_plain_forward(tmp_path, at_once):
    folder = save_mixtures(tmp_path)
    found = compared(folder, at_once)
    own, other = plain(folder)
    tokens = sum(map(len, SAMPLES))
    assert [(one.layer, one.mixture, one.tokens, one.chosen) for one in found] == [
        (layer, "mlp", tokens, 2) for layer in range(4)
    ]
    for one, ours, theirs in zip(found, own, other, strict=True):
        pairs = [(set(a), set(b)) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        assert one.same == pytest.approx(sum(a == b for a, b in pairs) / tokens)
        assert one.common == pytest.approx(sum(len(a & b) for a, b in pairs) / (2 * tokens))
    assert any(0 < one.same < 1 for one in found)


def test_the_way_back_sees_the_same(tmp_path):
    folder = save_mixtures(tmp_path)

    class Nobody:
        def wants(self, name):
            return True

        def gradient(self, name, parameter, gradient, sample):
            pass

        def finish(self, layer, parameters):
            pass

    decoder, weights = opened(folder / "math")
    routers = RouterComparison(decoder, opened(folder / "base")[1])
    observe_gradients(decoder, weights, SAMPLES, Nobody(), CPU, observing=routers.attached)
    assert routers.found() == compared(folder)


def test_what_was_summed_up_is_taken_up_again(tmp_path):
    folder = save_mixtures(tmp_path)
    decoder, weights = opened(folder / "math")
    routers = RouterComparison(decoder, opened(folder / "base")[1])
    run_blocks(decoder, weights, micro_batches(SAMPLES, 64, 0), VisitorWithRouters(Watcher(decoder), routers), CPU)
    again = RouterComparison(decoder, opened(folder / "base")[1])
    again.restore(copy.deepcopy(routers.state()), CPU)
    assert again.found() == routers.found()


# a bias of the scores and groups of experts; scores from the router's own module; a router in the block itself
@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gpt_oss", "gemma4_text", "jamba", "qwen3_5_moe_text"])
def test_a_router_that_all_share_keeps_all(tmp_path, family):
    from safetensors.torch import save_file

    from tests.tiny_mixtures import weights as stored

    folder = save_mixtures(tmp_path, family, **({"enable_moe_block": True} if family == "gemma4_text" else {}))
    found = compared(folder)
    assert found and all(one.tokens == sum(map(len, SAMPLES)) and one.same is not None for one in found)
    base, names = stored(folder / "base"), ("gate", "router")
    shared = {
        name: base[name] if any(one in name.split(".") for one in names) else value
        for name, value in stored(folder / "math").items()
    }
    save_file(shared, folder / "math" / "model.safetensors", {"format": "pt"})
    assert all((one.same, one.common) == (1.0, 1.0) for one in compared(folder))


def test_choices_that_cannot_be_seen_are_left_empty(tmp_path):
    folder = save_mixtures(tmp_path, "llama4_text")
    found = compared(folder)
    assert found and all((one.tokens, one.same, one.common) == (0, None, None) for one in found)
