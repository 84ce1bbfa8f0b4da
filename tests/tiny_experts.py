"""A tiny pair whose experts are better on their own text than the base, as real ones are: fine-tuned for a second or two."""

import json
from pathlib import Path
from typing import Any

from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import save_tokenizer, write_config

WORDS = {"code": ("for", "while", "yield", "return"), "math": ("sum", "root", "prime", "angle")}
_STEPS = {"base": 60, "expert": 40}


def save_experts(folder: Path, rows: int = 120, **changes: Any) -> Path:
    """Make `folder` with `base`, `code` and `math`, a text for each expert and `pair.yaml`; all paths are relative to it."""
    texts = {name: _rows(name, rows) for name in WORDS}
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    save_tokenizer(save_tiny("llama", folder / "base", layers=2))
    _train(folder / "base", folder / "base", [line[:12] for lines in texts.values() for line in lines], _STEPS["base"])
    for seed, name in enumerate(WORDS):
        _train(folder / "base", folder / name, texts[name][: rows // 2], _STEPS["expert"], seed)
        save_tokenizer(folder / name)
    sources = {name: {"path": f"{name}.jsonl", "text": "{text}", "seqlen": 48} for name in WORDS}
    settings = {
        "model_info": [{"name": f"./{name}", "type": name} for name in ("base", *WORDS)],
        "dataset": sources["code"],
        "calibration": sources,
        "nsamples": 4,
    }
    write_config(folder, settings | changes)
    return folder


def _rows(name: str, count: int) -> list[str]:
    """Distinct lines of a few words, different ones for each expert."""
    words = WORDS[name]
    return [f"{words[i % 4]} {words[(i // 4) % 4]} {i} {words[(3 * i + 1) % 4]} {words[i % 3]}" for i in range(count)]


def _train(start: Path, end: Path, texts: list[str], steps: int, seed: int = 0) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = [ids[int(i)] for i in torch.randint(len(ids), (8,), generator=draw)]
        batch = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        loss = model(input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long(), labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(end)
