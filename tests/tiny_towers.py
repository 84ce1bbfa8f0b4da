"""The language tower of a tiny model with a vision tower, as a model of its own."""

from typing import Any


def text_model(model: Any) -> Any:
    """The language tower of a model as one that predicts tokens, with the same numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings
    text = AutoModelForCausalLM.from_config(model.config.text_config, dtype=torch.float32)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    return text.eval()
