"""What is known of a forward without weights, against models whose passes were seen with them.

python -m pytest tests/passes/test_dry_walk.py
"""

import pytest
import torch

from tests.architectures.shrinking import tiny_model
from tests.architectures.sweep import read_rows
from tests.refusals import refused
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.weight_source import build_skeleton
from utils.passes.dry_walk import dry_walk

ROWS = {row.label: row for row in read_rows()}


def walked(label, folder):
    tiny_model(ROWS[label]).save_pretrained(folder)
    decoder = find_decoder(build_skeleton(open_checkpoint(str(folder)), torch.float32, False), None, {}, "it")
    before = {name: value.device.type for name, value in decoder.model.named_parameters()}
    try:
        return dry_walk(decoder, [5, 6, 7, 8, 9, 10], "model it")
    finally:
        assert {name: value.device.type for name, value in decoder.model.named_parameters()} == before


@pytest.mark.parametrize(
    "label",
    [
        "llama:causal",
        "bloom:causal",  # blocks return tuples
        "bamba:causal",  # of two
        "gemma3n_text:causal",  # four states for each token, rows of tables between the blocks
        "rwkv:causal",  # a state that goes through all blocks
        "git:causal",  # a vision tower with as many blocks
        "qwen2_5_vl:image-text",
    ],
)
def test_models_whose_text_goes_through_all_blocks_pass(label, tmp_path):
    assert walked(label, tmp_path).rows_added == 0


@pytest.mark.parametrize(
    ("label", "why"),
    [
        pytest.param("mllama:causal", "text alone passes block 3 over", marks=pytest.mark.slow),
        ("mllama:image-text", "text alone passes block 3 over"),
        ("hrm_text:causal", "its forward comes to block 0 again"),
        ("xlnet:causal", "5 tokens times 2 samples"),
        pytest.param(
            "blip-2:image-text", "its forward on text alone ends before its first block", marks=pytest.mark.slow
        ),
        ("idefics:image-text", "its forward on text alone ends before its first block"),
    ],
)
def test_models_that_pass_their_blocks_otherwise_are_refused(label, why, tmp_path):
    with refused("model-unsupported", why):
        walked(label, tmp_path)


def test_rows_that_a_model_adds_are_counted(tmp_path):
    assert walked("cpmant:causal", tmp_path).rows_added == 32  # prompts of its own


def test_outputs_around_the_blocks_have_their_shapes(tmp_path):
    seen = walked("kosmos-2.5:image-text", tmp_path)
    assert seen.outputs["text_model.model.segment_emb"] == (2, 1, 32)
    assert seen.outputs["text_model.model.embed_tokens"] == (2, 5, 32)


def hooked(folder, hook):
    """A model whose own code does something with what its embedding gives."""
    tiny_model(ROWS["llama:causal"]).save_pretrained(folder)
    decoder = find_decoder(build_skeleton(open_checkpoint(str(folder)), torch.float32, False), None, {}, "it")
    decoder.model.get_input_embeddings().register_forward_hook(hook)
    return dry_walk(decoder, [5, 6, 7, 8, 9, 10], "model it")


def test_autograd_can_use_what_a_model_keeps_of_it(tmp_path):
    kept = []
    hooked(tmp_path, lambda module, args, output: kept.append(output))
    assert kept and not any(one.is_inference() for one in kept)


def test_a_lack_of_memory_is_no_lack_of_the_model(tmp_path):
    def fail(module, args, output):
        raise MemoryError

    with pytest.raises(MemoryError):
        hooked(tmp_path, fail)
