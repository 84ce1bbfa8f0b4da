"""A block that does not fit: its experts one at a time, with the same numbers, and never two of them in memory.

python -m pytest tests/passes/test_experts_in_parts.py
"""

import contextlib

import pytest
import torch

from tests.commands_here import run_here
from tests.plain_gradients import token_lists
from tests.refusals import refusal_code, refused
from tests.tiny_mixtures import save_mixtures, save_stacked
from utils.commands import too_large
from utils.guidance.lewis.visitor import LewisVisitor
from utils.guidance.method import guidance_methods
from utils.merging.allocations import LiveBytes
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.pair.batches import micro_batches
from utils.passes import block_runner
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


def opened(folder):
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, torch.float32, trust_remote_code=False)
    layout = stored_layout(model, checkpoint)
    return find_decoder(model, None, {}, "test model"), layout, StreamedWeights(layout, CPU, torch.float32)


def measured(folder, counting=contextlib.nullcontext):
    decoder, layout, weights = opened(folder)
    batches = micro_batches(ENCODED, 64, pad_id=0)
    tokens = sum(map(len, ENCODED))
    visitor = LewisVisitor(decoder, tokens, tokens, 0.0, layout, fewest_tokens=8)
    parts_bytes(decoder, layout)  # what is found out on the meta device is known by now, and is not counted
    with counting() as counted:
        finals = run_blocks(decoder, weights, batches, visitor, CPU)
    return finals, visitor, counted


@pytest.mark.parametrize("stored", ["apart", "stacked"])
def test_numbers_are_those_of_whole_blocks(stored, request, monkeypatch):
    folder = request.getfixturevalue(stored) / "base"
    finals, whole, _ = measured(folder)
    monkeypatch.setattr(block_runner, "available_bytes", lambda device: 0)
    in_parts, apart, _ = measured(folder)
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
def test_what_is_alive_is_far_less_than_a_block(stored, request, monkeypatch):
    folder = request.getfixturevalue(stored) / "base"
    decoder, layout, _ = opened(folder)
    whole, without_experts, matrix = parts_bytes(decoder, layout)
    experts = whole - without_experts
    monkeypatch.setattr(block_runner, "available_bytes", lambda device: 2**40)
    *_, usual = measured(folder, LiveBytes)
    monkeypatch.setattr(block_runner, "available_bytes", lambda device: 0)
    *_, counted = measured(folder, LiveBytes)
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


@pytest.mark.parametrize("guidance", ["sens_merging", "saliency_budget", "submodule_linearity", "gram_mean", "tuned"])
def test_what_needs_whole_blocks_is_refused_with_the_numbers(guidance, apart, monkeypatch, tmp_path):
    decoder, layout, _ = opened(apart / "base")
    whole, without_experts, _ = parts_bytes(decoder, layout)
    monkeypatch.chdir(apart)
    monkeypatch.setattr(too_large, "available_bytes", lambda device: (whole + without_experts) // 2)
    flags = ["--config", "pair.yaml", "--out_dir", str(tmp_path / "out"), "--guidance", guidance]
    done = run_here("lewis_importance.py", *flags, "--dtype", "float32", "--device", "cpu")
    assert refusal_code(done) == "memory-block-too-large"
    assert "--guidance lewis" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "whole", "apart", "dtype", "wanted", "unwanted"),
    [
        ("lewis", 30, 12, torch.float32, ["one at a time", "--dtype bfloat16"], ["needs a block whole", "--guidance"]),
        ("lewis", 30, 30, torch.bfloat16, [], ["--dtype", "--guidance", "one at a time"]),
        ("gram_mean", 18, 8, torch.float32, ["--guidance lewis", "--dtype bfloat16", "gram_mean needs"], []),
        ("gram_mean", 18, 8, torch.bfloat16, ["--guidance lewis (which"], ["--dtype"]),
        ("gram_mean", 30, 12, torch.float32, [], ["--guidance lewis", "--dtype"]),
        ("submodule_linearity", 8, 8, torch.bfloat16, ["--guidance lewis"], ["--dtype", "(which"]),
        ("submodule_linearity", 30, 30, torch.float32, [], ["--dtype", "--guidance"]),
    ],
)
@pytest.mark.parametrize("is_gpu", [False, True])
def test_only_what_would_do_is_advised(name, whole, apart, dtype, wanted, unwanted, is_gpu):
    """Of ten bytes that are free."""
    needs, method = too_large.BlockNeeds(whole, apart, dtype, 10, is_gpu), guidance_methods()[name]
    assert needs.of(method) > needs.free
    said = f"{needs.why(method)}; use {needs.remedies(method)}"
    assert all(one in said for one in wanted) and not any(one in said for one in unwanted)
    assert ("--device cpu" in said) == is_gpu and said.endswith("a machine with more memory")


def test_command_1_measures_in_parts_what_it_measures_whole(apart, monkeypatch, tmp_path):
    monkeypatch.chdir(apart)
    tables = []
    for name in ("whole", "parts"):
        flags = ["--config", "pair.yaml", "--out_dir", str(tmp_path / name), "--dtype", "bfloat16"]
        done = run_here("lewis_importance.py", *flags, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        tables.append((tmp_path / name / "norms.csv").read_text())
        monkeypatch.setattr(block_runner, "available_bytes", lambda device: 0)
    assert tables[0] == tables[1]
