"""The small files of a model folder that make up its tokenizer: which they are, whether two are the same, copying.

Two tokenizers count as the same if the files that define the vocabulary are the same bytes and the settings that name
or add tokens are equal. Settings that only shape a text around the tokens (templates, padding, lengths) may differ.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.models.small_files import TEMPLATE_FOLDER, check_copied

VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "added_tokens.json",
)  # fmt: skip
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
GENERATION = "generation_config.json"
_TEXT_SETTINGS = {
    "chat_template", "model_max_length", "name_or_path", "padding_side", "truncation_side", "padding", "truncation",
    "max_length", "stride", "clean_up_tokenization_spaces", "processor_class", "is_local", "local_files_only",
}  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES) or any(folder.glob("*.tiktoken"))


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder holds a chat template, in a file of its own or inside the tokenizer's settings."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES):
        return True
    return bool(_settings(folder / SETTINGS_FILES[0]).get("chat_template"))


def fingerprint(folder: Path) -> str:
    """SHA-256 over everything that decides which text becomes which token id; equal for equal tokenizers."""
    digest = hashlib.sha256()
    for path in sorted([folder / name for name in VOCABULARY_FILES] + list(folder.glob("*.tiktoken"))):
        if path.is_file():
            digest.update(f"{path.name}|{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for name in SETTINGS_FILES:
        kept = {key: value for key, value in _settings(folder / name).items() if key not in _TEXT_SETTINGS}
        digest.update(f"{name}|{json.dumps(kept, sort_keys=True)}\n".encode())
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a model folder's tokenizer and chat templates; files already in `target` stay. Returns the names copied."""
    return copy_missing(source, target, tokenizer_names(source)) + copy_chat_template(source, target)


def copy_chat_template(source: Path, target: Path) -> list[str]:
    """Copy the chat template files of a model folder; files already in `target` stay. Returns the names copied."""
    copied = copy_missing(source, target, TEMPLATE_FILES)
    if (source / TEMPLATE_FOLDER).is_dir() and not (target / TEMPLATE_FOLDER).exists():
        (target / TEMPLATE_FOLDER).mkdir()
        copy_missing(source, target, _templates(source))
        copied.append(TEMPLATE_FOLDER)
    return copied


def copied_names(source: Path) -> list[str]:
    """The files of a model folder's tokenizer, templates and generation settings that a merge may copy."""
    return [*tokenizer_names(source), *TEMPLATE_FILES, *_templates(source), GENERATION]


def tokenizer_names(source: Path) -> list[str]:
    """The files that a model folder's tokenizer may consist of."""
    return [*VOCABULARY_FILES, *SETTINGS_FILES, *(path.name for path in source.glob("*.tiktoken"))]


def _templates(source: Path) -> list[str]:
    return sorted(f"{TEMPLATE_FOLDER}/{path.name}" for path in source.glob(f"{TEMPLATE_FOLDER}/*"))


def copy_missing(source: Path, target: Path, names: list[str] | tuple[str, ...]) -> list[str]:
    """Copy those files of `source` that exist and that `target` lacks, contents only; returns their names.

    Raises:
        UserError: a file is linked from elsewhere, or calls itself JSON and is not; nothing is copied then.
    """
    check_copied(source, names)
    copied = []
    for name in names:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    return copied


def small_bytes(folder: Path) -> int:
    """Bytes of a model folder's files that a merge may copy."""
    return sum((folder / name).stat().st_size for name in copied_names(folder) if (folder / name).is_file())


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path, str(path)) if path.is_file() else {}
