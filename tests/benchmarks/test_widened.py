"""Pairs made larger say what the small ones say, and so do their merges."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.widened import widen, widened

WIDTH, DEPTH = 3, 2


def small(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2.0)
    return model


def stored(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


@torch.no_grad()
def test_the_larger_model_says_the_same():
    model, words = small(0), torch.arange(12)[None] * 4
    larger_config = LlamaConfig(**{
        **model.config.to_dict(), "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 6,
    })  # fmt: skip
    larger = LlamaForCausalLM(larger_config).eval()
    larger.load_state_dict({**larger.state_dict(), **dict(widened(stored(model), WIDTH, DEPTH))})
    larger.tie_weights()
    torch.testing.assert_close(larger(words).logits, model(words).logits, rtol=1e-4, atol=1e-4)


def test_a_merge_of_larger_models_is_the_larger_model_of_the_merge():
    base, expert = stored(small(0)), stored(small(1))
    large_base, large_expert = (dict(widened(one, WIDTH, DEPTH)) for one in (base, expert))
    mixed = dict(widened({name: value.lerp(expert[name], 0.4) for name, value in base.items()}, WIDTH, DEPTH))
    for name, value in large_base.items():
        torch.testing.assert_close(value.lerp(large_expert[name], 0.4), mixed[name])


def test_it_is_written_with_its_tokenizer(tmp_path):
    from benchmarks.shapes import parameter_count, write_tokenizer

    source = tmp_path / "small"
    small(0).save_pretrained(source)
    (tmp_path / "rows.jsonl").write_text('{"text": "a few words"}\n')
    write_tokenizer(source, [tmp_path / "rows.jsonl"])
    target = widen(source, tmp_path / "large", WIDTH, DEPTH)
    loaded = LlamaForCausalLM.from_pretrained(target)
    assert loaded.config.num_hidden_layers == 4 and loaded.dtype == torch.bfloat16
    assert parameter_count(target) == sum(weight.numel() for weight in loaded.parameters())
    assert (target / "tokenizer.json").exists()


def test_a_head_of_its_own_is_refused():
    with pytest.raises(ValueError, match="head"):
        dict(widened({"lm_head.weight": torch.zeros(4, 4)}, WIDTH, DEPTH))
