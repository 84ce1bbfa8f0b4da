"""A block that does not fit: its experts one at a time, with the same numbers, and never two of them in memory.

python -m pytest tests/passes/test_experts_in_parts.py
"""

import contextlib

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from tests.architectures.shrinking import save_changed, tiny_model
from tests.architectures.sweep import read_rows
from tests.commands_here import run_here
from tests.plain_gradients import token_lists
from tests.refusals import refusal_code, refused
from tests.tiny_mixtures import save_mixtures, save_stacked
from tests.tiny_pairs import save_rows, save_tokenizer, write_config
from utils.commands import block_memory
from utils.guidance.lewis.visitor import LewisVisitor
from utils.guidance.method import guidance_methods
from utils.merging.allocations import LiveBytes
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.pair.batches import micro_batches
from utils.passes.block_gradients import observe_gradients
from utils.passes.block_runner import run_blocks
from utils.passes.experts_in_parts import experts_in_parts, parts_bytes, stack_names

CPU = torch.device("cpu")
ENCODED = token_lists((17, 30, 5, 23, 11))


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Experts stored each on its own, many enough that they are most of a block."""
    return save_mixtures(tmp_path_factory.mktemp("apart"), num_experts=16, moe_intermediate_size=64)


@pytest.fixture(scope="module")
def stacked(apart, tmp_path_factory):
    return save_stacked(apart, tmp_path_factory.mktemp("stacked"))


def opened(folder, apart=False):
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, torch.float32, trust_remote_code=False)
    layout = stored_layout(model, checkpoint)
    return (
        find_decoder(model, None, {}, "test model"),
        layout,
        StreamedWeights(layout, CPU, torch.float32, experts_apart=apart),
    )


def measured(folder, apart, counting=contextlib.nullcontext):
    decoder, layout, weights = opened(folder, apart)
    batches = micro_batches(ENCODED, 64, pad_id=0)
    tokens = sum(map(len, ENCODED))
    visitor = LewisVisitor(decoder, tokens, tokens, 0.0, layout, fewest_tokens=8)
    with counting() as counted:
        finals = run_blocks(decoder, weights, batches, visitor, CPU)
    return finals, visitor, counted


@pytest.mark.parametrize("stored", ["apart", "stacked"])
def test_numbers_are_those_of_whole_blocks(stored, request):
    folder = request.getfixturevalue(stored) / "base"
    finals, whole, _ = measured(folder, False)
    in_parts, apart, _ = measured(folder, True)
    for one, other in zip(finals, in_parts, strict=True):
        assert torch.equal(one, other)
    assert apart.norms == whole.norms and list(apart.stacks) == list(whole.stacks)
    for key, one in whole.stacks.items():
        assert torch.equal(apart.stacks[key].tokens, one.tokens)
        assert list(apart.stacks[key].norms) == list(one.norms)
        for name, norm in one.norms.items():
            if stored == "apart":
                assert torch.equal(apart.stacks[key].norms[name], norm)
            else:  # the sum over one tensor with all experts is made of theirs
                torch.testing.assert_close(apart.stacks[key].norms[name], norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stored", ["apart", "stacked"])
def test_what_is_alive_is_far_less_than_a_block(stored, request):
    folder = request.getfixturevalue(stored) / "base"
    decoder, layout, _ = opened(folder)
    whole, without_experts, matrix = parts_bytes(decoder, layout)
    experts = whole - without_experts
    *_, usual = measured(folder, False, LiveBytes)
    *_, counted = measured(folder, True, LiveBytes)
    assert usual.peak > experts  # the count sees them
    assert counted.peak < usual.peak - experts + 8 * matrix


def test_each_matrix_is_that_of_the_stack(apart, stacked):
    for folder in (apart / "base", stacked / "base"):
        decoder, layout, weights = opened(folder)
        names = stack_names(decoder, 1, layout)
        assert len(names) == 2
        for name, stack in weights.fetch(list(names)).items():
            for expert in range(len(stack)):
                assert torch.equal(weights.fetch_expert(name, expert), stack[expert])
            pieces = layout.split(name, stack)
            for expert in range(len(stack)):
                for stored, piece in layout.split_expert(name, expert, stack[expert]).items():
                    whole = pieces[stored]
                    assert torch.equal(piece, whole if whole.ndim == 2 else whole[expert])


def test_an_architecture_that_takes_all_experts_at_once_is_refused(apart):
    decoder, layout, weights = opened(apart / "base")
    names = stack_names(decoder, 0, layout)
    stack = decoder.model.get_parameter(names[0])
    with experts_in_parts(decoder, 0, names, weights.fetch_expert), refused("experts-not-in-parts"):
        torch.bmm(stack, stack.transpose(1, 2))


def test_what_does_not_fit_in_parts_is_refused_with_the_numbers(apart, monkeypatch, tmp_path):
    decoder, layout, _ = opened(apart / "base")
    _, without_experts, _ = parts_bytes(decoder, layout)
    monkeypatch.chdir(apart)
    monkeypatch.setattr(block_memory, "available_bytes", lambda device: without_experts - 1)
    flags = ["--config", "pair.yaml", "--out_dir", str(tmp_path / "out"), "--guidance", "submodule_linearity"]
    done = run_here("lewis_importance.py", *flags, "--dtype", "float32", "--device", "cpu")
    assert refusal_code(done) == "memory-block-too-large"
    assert "even with the experts of a block one at a time" in done.stderr and "--guidance" not in done.stderr
    assert not (tmp_path / "out").exists()


FLOAT32 = "submodule_linearity"  # computes in it whatever --dtype says
EVERY = "lewis, gram_mean, saliency_budget"


@pytest.mark.parametrize(
    ("name", "whole", "apart", "dtype", "wanted", "unwanted"),
    [
        ("lewis", 30, 12, torch.float32, ["one at a time", "--dtype bfloat16"], ["--guidance"]),
        ("lewis", 30, 30, torch.bfloat16, [], ["--dtype", "--guidance", "one at a time"]),
        (FLOAT32, 30, 8, torch.bfloat16, [f"{EVERY} or tuned (one expert", "even"], ["--dtype", "sens_merging"]),
        (FLOAT32, 8, 8, torch.bfloat16, [f"{EVERY} or tuned"], ["--dtype", "(one", "sens_merging"]),
        (FLOAT32, 30, 12, torch.float32, [], ["--guidance", "--dtype"]),
    ],
)
@pytest.mark.parametrize("is_gpu", [False, True])
def test_only_what_would_do_is_advised(name, whole, apart, dtype, wanted, unwanted, is_gpu):
    """Of ten bytes that are free, for one expert."""
    needs, method = block_memory.BlockNeeds(whole, apart, dtype, 10, is_gpu), guidance_methods()[name]
    assert needs.of(method) > needs.free
    said = f"{needs.why}; use {needs.remedies(method, 1)}"
    assert all(one in said for one in wanted) and not any(one in said for one in unwanted)
    assert ("--device cpu" in said) == is_gpu and said.endswith("a machine with more memory")


GUIDANCES = [
    *("lewis", "sens_merging", "gram_mean", "saliency_budget"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tuned", "submodule_linearity")),
]


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_command_1_measures_in_parts_what_it_measures_whole(guidance, apart, monkeypatch, tmp_path):
    """Also with gradients, block by block on the way back."""
    of_differences = (1e-3, 1e-6) if guidance == "submodule_linearity" else ()  # of outputs that other kernels give
    compare_whole_and_parts(guidance, apart, monkeypatch, tmp_path, *of_differences)


def compare_whole_and_parts(guidance, folder, monkeypatch, tmp_path, rtol=1e-6, atol=1e-12):
    monkeypatch.chdir(folder)
    decoder, layout, _ = opened(folder / "base")
    whole, without_experts, _ = parts_bytes(decoder, layout)
    tables, flags = [], ["--config", "pair.yaml", "--guidance", guidance, "--dtype", "float32", "--device", "cpu"]
    flags += [] if guidance == "lewis" else ["--accept_useless_text"]
    flags += ["--tune_steps", "2"] if guidance == "tuned" else []
    both = guidance_methods()[guidance].models_at_once(2) > 1  # of one model a block would fit
    for name, free in (("whole", 2**40), ("parts", whole * 3 // 2 if both else (whole + without_experts) // 2)):
        monkeypatch.setattr(block_memory, "available_bytes", lambda device, free=free: free)
        done = run_here("lewis_importance.py", *flags, "--out_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert ("one at a time" in done.stdout) == (name == "parts")
        tables.append({file.name: file for file in (tmp_path / name).iterdir() if file.name != "manifest.json"})
    assert tables[0].keys() == tables[1].keys()
    for name, file in tables[0].items():
        if file.suffix == ".csv":
            one, other = (pd.read_csv(each[name]) for each in tables)
            if "count" in one:  # an entry at the edge of a bin may fall into the next one
                moved = one.pop("count") - other.pop("count")
                assert moved.sum() == 0 and moved.abs().max() <= 1 and moved.abs().sum() <= 4
            assert_frame_equal(one, other, check_exact=False, rtol=rtol, atol=atol)
        elif file.suffix == ".safetensors":
            one, other = (load_file(each[name]) for each in tables)
            assert one.keys() == other.keys()
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-12, msg=key)


def gradients(folder, apart, counting=contextlib.nullcontext):
    """Losses, the sensitivity of each parameter and expert's matrix, and what was alive."""
    decoder, _, weights = opened(folder, apart)
    observer = Observed()
    with counting() as counted:
        losses = observe_gradients(decoder, weights, ENCODED[:2], observer, CPU)
    return losses, observer.found, counted


class Observed:
    """The sum over samples of |parameter * gradient|, of each expert of a stack by itself."""

    def __init__(self):
        self.found = {}

    def wants(self, name):
        return True

    def gradient(self, name, parameter, gradient, sample):
        rows = [(name, parameter, gradient)]
        if gradient.ndim == 3:
            rows = [((name, expert), parameter[expert], gradient[expert]) for expert in range(len(gradient))]
        for key, *both in rows:
            self.add(key, *both)

    def expert_gradient(self, name, expert, matrix, gradient, sample):
        assert matrix.shape == gradient.shape
        self.add((name, expert), matrix, gradient)

    def add(self, key, parameter, gradient):
        self.found[key] = self.found.get(key, 0) + float((parameter * gradient).abs().sum(dtype=torch.float64))

    def finish(self, layer, parameters):
        pass


@pytest.mark.parametrize("stored", ["apart", "stacked"])
def test_gradients_are_those_of_whole_blocks_with_far_less_alive(stored, request):
    folder = request.getfixturevalue(stored) / "base"
    decoder, layout, _ = opened(folder)
    whole, without_experts, matrix = parts_bytes(decoder, layout)
    losses, wanted, usual = gradients(folder, False, LiveBytes)
    found_losses, found, counted = gradients(folder, True, LiveBytes)
    assert found_losses == losses
    for key, value in wanted.items():
        assert found.get(key, 0.0) == pytest.approx(value, rel=1e-6), key
    assert found.keys() <= wanted.keys()
    assert usual.peak > whole - without_experts  # the count sees them
    assert counted.peak < usual.peak - (whole - without_experts) + 8 * matrix


@pytest.mark.parametrize("guidance", ["lewis", "sens_merging"])
def test_all_experts_in_one_product_come_one_at_a_time_too(guidance, tmp_path, monkeypatch):
    """As Llama 4 takes them."""
    compare_whole_and_parts(guidance, save_llama4(tmp_path / "pair"), monkeypatch, tmp_path, 1e-3, 1e-6)


def test_an_architecture_that_takes_all_experts_in_another_way_is_refused_before_measuring(tmp_path, monkeypatch):
    def forward(self, hidden_states):
        rows = hidden_states.view(self.num_experts, -1, self.hidden_size)
        gate, up = torch.einsum("eri,eio->ero", rows, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("eri,eio->ero", up * self.act_fn(gate), self.down_proj).flatten(end_dim=1)

    monkeypatch.setattr(Llama4TextExperts, "forward", forward)
    monkeypatch.chdir(save_llama4(tmp_path))
    decoder, layout, _ = opened(tmp_path / "base")
    whole, without_experts, _ = parts_bytes(decoder, layout)
    monkeypatch.setattr(block_memory, "available_bytes", lambda device: (whole + without_experts) // 2)
    for guidance in ("lewis", "saliency_budget"):
        flags = ["--config", "pair.yaml", "--out_dir", "out", "--guidance", guidance, "--dtype", "float32"]
        done = run_here("lewis_importance.py", *flags, "--device", "cpu")
        assert refusal_code(done) == "memory-block-too-large"
        assert "all experts of a block at once" in done.stderr and "--guidance lewis" not in done.stderr


def save_llama4(folder):
    """Three tiny Llama 4 text models."""
    model = tiny_model({row.label: row for row in read_rows()}["llama4_text:causal"])
    model.save_pretrained(folder / "base")
    for seed, name in enumerate(("code", "math"), 1):
        save_changed(model, folder / name, seed)
    for name in ("base", "code", "math"):
        save_tokenizer(folder / name, size=90)
    save_rows(folder)
    models = [{"name": f"./{name}", "type": name} for name in ("base", "code", "math")]
    write_config(folder, {"model_info": models})
    return folder
