"""A tiny pair of models with tokenizers, text and a pair config in one folder; and what a folder holds, to compare."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_checkpoints import VOCABULARY, edit_tensors, save_tiny

TEXTS = {"code": "{answer}", "math": "{question} {answer}"}  # of each expert's own
CALIBRATION = {name: {"path": "rows.jsonl", "text": text, "seqlen": 32} for name, text in TEXTS.items()}
CHATML = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
ASKING_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS_CHAT = "{{ bos_token }}" + CHATML


def save_tokenizer(folder: Path, *, chat_template: str | None = None, bos: bool = True, size: int = VOCABULARY) -> Path:
    """Save a tokenizer with one token per printable ASCII character, which writes BOS itself unless told not to."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *map(chr, range(32, 32 + size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )
    fast.save_pretrained(folder)
    return folder


def save_pair(folder: Path, family: str = "llama", layers: int = 2) -> Path:
    """Make `folder` with models `base`, `code` and `math`, text `rows.jsonl` and a config `pair.yaml`; paths are
    relative to the folder."""
    for seed, name in enumerate(("base", "code", "math")):
        save_tokenizer(save_tiny(family, folder / name, seed=seed, layers=layers))
    save_rows(folder)
    write_config(folder)
    return folder


def save_rows(folder: Path) -> None:
    """Make `rows.jsonl`, the text."""
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair_settings() -> dict[str, Any]:
    """The pair config of `save_pair` as plain data."""
    return {
        "model_info": [
            {"name": "./base", "type": "base"},
            {"name": "./code", "type": "code"},
            {"name": "./math", "type": "math"},
        ],
        "dataset": {"path": "rows.jsonl", "text": "{question} {answer}", "seqlen": 32},
        "nsamples": 4,
    }


def write_config(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write `pair.yaml` with some keys replaced."""
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump({**pair_settings(), **(changes or {})}, sort_keys=False, allow_unicode=True))
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_token(folder: Path) -> Path:
    """Give a model with an untied head one token more, with the row of the first."""
    import torch

    def add_rows(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    save_tokenizer(folder, size=VOCABULARY + 1)
    edit_tensors(folder, add_rows)
    edit_json(folder / "config.json", vocab_size=VOCABULARY + 1)
    return folder


def sample_ids(folder: Path, expert: str, measured: str = "dfs") -> list[list[int]]:
    """Token ids of an expert's samples of `CALIBRATION`: the tokenizer has BOS, and one token per character."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / measured / "manifest.json").read_text())["samples"]
    texts = [TEXTS[expert].format(**rows[row]) for row in manifest[0]["rows"]]
    return [[0, *(3 + ord(letter) - 32 for letter in text)] for text in texts]


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder: file contents, link targets, None for folders, by relative path."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = path.readlink()
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files, by relative path, below a folder, and return it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
