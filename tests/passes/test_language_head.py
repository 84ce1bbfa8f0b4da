"""Final hidden states and the model's own head give the logits of a plain forward.

python -m pytest tests/passes/test_language_head.py
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.plain_gradients import CPU, opened, token_lists
from tests.refusals import refused
from tests.tiny_checkpoints import FAMILIES, HIDDEN, OTHERS, VOCABULARY, edit_tensors, save_any, save_tiny
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import run_blocks
from utils.passes.language_head import fetch_head, language_head, require_head


class Nothing:
    """A visitor that does nothing."""

    rewrites = False

    def observing(self, layer, block):
        import contextlib

        return contextlib.nullcontext()

    def begin(self, batch):
        pass

    def finish(self, layer, block):
        pass


def plain_logits(folder, ids, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def logits_by_parts(folder, ids, chunk):
    decoder, weights = opened(folder)
    (final,) = run_blocks(decoder, weights, [MicroBatch.of([ids])], Nothing(), CPU)
    _, weights = opened(folder)
    tensors = fetch_head(decoder, weights)
    with torch.inference_mode(), language_head(decoder, tensors, CPU) as to_logits:
        found = torch.cat([to_logits(part) for part in final[0].split(chunk)])
    assert all(value.is_meta for value in decoder.model.parameters())
    assert not any("forward" in vars(module) for module in decoder.model.modules())
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_familys_logits_are_the_models_own(family, tmp_path):
    save_any(family, tmp_path)
    ids = token_lists((13,))[0]
    torch.testing.assert_close(logits_by_parts(tmp_path, ids, 5), plain_logits(tmp_path, ids), atol=2e-6, rtol=2e-5)


def test_caps_and_scales_of_logits_are_the_models_own(tmp_path):
    """They act: without them, logits would be others."""
    ids = token_lists((9,))[0]
    for name, setting in (("capped", {"final_logit_softcapping": 0.05}), ("plain", {"final_logit_softcapping": None})):
        save_tiny("gemma2", tmp_path / name, **setting)
    capped, plain = (logits_by_parts(tmp_path / name, ids, 9) for name in ("capped", "plain"))
    assert capped.abs().max() <= 0.05 < plain.abs().max()
    torch.testing.assert_close(capped, 0.05 * torch.tanh(plain / 0.05), atol=1e-6, rtol=1e-5)


def test_a_tied_head_that_is_stored_and_differs_is_used_as_stored(tmp_path):
    save_tiny("gemma3", tmp_path)
    edit_tensors(
        tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(VOCABULARY, HIDDEN).bfloat16()})
    )
    ids = token_lists((9,))[0]
    torch.testing.assert_close(logits_by_parts(tmp_path, ids, 4), plain_logits(tmp_path, ids), atol=2e-6, rtol=2e-5)


def test_a_tied_head_is_given_by_the_embedding(tmp_path):
    save_tiny("gpt2", tmp_path)
    decoder, weights = opened(tmp_path)
    tensors = fetch_head(decoder, weights)
    hidden = torch.randn(3, 32)
    with torch.inference_mode(), language_head(decoder, tensors, CPU) as to_logits:
        stored = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].float()
        torch.testing.assert_close(to_logits(hidden), hidden @ stored.T)


def test_the_models_forward_comes_back_after_an_error(tmp_path):
    save_tiny("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    tensors = fetch_head(decoder, weights)
    with pytest.raises(RuntimeError), torch.inference_mode(), language_head(decoder, tensors, CPU) as to_logits:
        to_logits(torch.randn(3, 31))  # not the hidden size
    assert "forward" not in vars(decoder.body) and all(value.is_meta for value in decoder.model.parameters())


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    save_tiny("llama", tmp_path / "untied")
    save_tiny("gemma3", tmp_path / "tied")
    for name, missing in (("untied", "lm_head.weight"), ("tied", "model.embed_tokens.weight")):
        decoder, weights = opened(tmp_path / name)
        require_head(decoder, weights.layout, "model x")
        short = {key: header for key, header in weights.layout.direct.items() if key != missing}
        with refused("model-no-head"):
            require_head(decoder, short, "model x")
