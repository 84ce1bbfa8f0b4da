"""Routers are found by structure alone: what the gates of experts are computed from, in real forward passes."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.architectures.shrinking import Row, tiny_model
from tests.architectures.sweep import read_rows
from tests.tiny_checkpoints import save_tiny
from tests.tiny_mixtures import save_mixtures
from utils.models.decoder import find_blocks, is_experts
from utils.models.opening import open_checkpoint
from utils.models.routers import router_parameters, routers_of

ROWS = {row.label: row for row in read_rows()}


def leaves_of(value: torch.Tensor) -> set[int]:
    """The parameters that a value is computed from, by id, from the graph that autograd keeps."""
    seen, found, waiting = set(), set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [other for other, _ in node.next_functions]
    return found


@contextlib.contextmanager
def gates_seen(model: nn.Module) -> Iterator[set[str]]:
    """The names of the parameters that gates, but not the experts' own inputs, are computed from."""
    names = {id(value): name for name, value in model.named_parameters()}
    found: set[str] = set()

    def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [
            one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one.is_floating_point()
        ]
        hidden, gates = tensors[0], tensors[1:]
        if not gates:  # scores are multiplied with the hidden states before
            found.update(names[one] for one in leaves_of(hidden) if "router" in names[one])
        for one in gates:
            found.update(names[leaf] for leaf in leaves_of(one) - leaves_of(hidden))

    handles = [
        module.register_forward_pre_hook(take, with_kwargs=True) for module in model.modules() if is_experts(module)
    ]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe", "jamba", "lfm2_moe"])
def test_routers_are_what_gates_are_computed_from(model_type):
    model = tiny_model(ROWS[f"{model_type}:causal"])
    found = set(router_parameters(model, "model"))
    with gates_seen(model) as seen:
        model(input_ids=torch.arange(2, 12)[None], use_cache=False)
    assert seen
    trained = dict(model.named_parameters())
    assert {name for name in found if name in trained} == seen


def test_biases_that_only_choose_are_routers_too():
    model = tiny_model(ROWS["deepseek_v3:causal"])
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in router_parameters(model, "model")
    model = tiny_model(ROWS["lfm2_moe:causal"])
    assert "model.layers.1.feed_forward.expert_bias" in router_parameters(model, "model")


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    model = tiny_model(Row("qwen3_next", "causal", {"num_experts": 8, "shared_expert_intermediate_size": 8}))
    found = {name.split(".", 3)[3] for name in router_parameters(model, "model")}
    assert found == {"mlp.gate.weight"}


def test_a_small_part_beside_experts_and_attention_is_no_router():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.k_proj, self.o_proj = nn.Linear(32, 4), nn.Linear(4, 32)

    model = tiny_model(ROWS["diffusion_gemma:image-text"])
    _, blocks = find_blocks(model, "model")
    for block in blocks:
        block.self_attn = Attention()
    ends = {name.rpartition("router.")[2] for name in router_parameters(model, "model")}
    assert ends == {"scale", "per_expert_scale", "proj.weight"}


def test_stored_names_are_those_of_the_checkpoint(tmp_path):
    save_mixtures(tmp_path, "mixtral")
    names = routers_of(open_checkpoint(str(tmp_path / "base")))
    assert names == tuple(f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(4))


def test_a_dense_model_has_none(tmp_path):
    assert routers_of(open_checkpoint(str(save_tiny("llama", tmp_path)))) == ()
