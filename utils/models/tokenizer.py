"""A model's tokenizer: loaded from its folder, and told apart from others by what makes it."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError, brief
from utils.models.class_config import class_config
from utils.models.headers import INDEX
from utils.publishing.manifest import file_sha256
from utils.trial import is_failure

_TOKENIZER_REMEDY = (
    "put the tokenizer.json and tokenizer_config.json it was trained with there; if it needs code of its own, give "
    "--trust_remote_code"
)
_TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"}
_tried: dict[str, bytes] = {}
_NOT_TOKENIZER = {"config.json", "generation_config.json", INDEX}


def tokenizer_digest(folder: Path, config: Mapping[str, Any]) -> str:
    """SHA-256 over what makes a model's tokenizer: equal digests mean equal tokenizers.

    That is every small file that is not known to be something else, and what `config.json` says where they do not
    name its class.
    """
    digest = hashlib.sha256(f"{config.get('model_type')}:{config.get('tokenizer_class')}".encode())
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in _TOKENIZER_SUFFIXES and path.name not in _NOT_TOKENIZER and path.is_file():
            digest.update(f"{path.relative_to(folder)}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer in a model's folder; `name` is what to call the model.

    Raises:
        UserError: it is missing, needs code that was not allowed, or cannot be loaded; or the config beside it cannot.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code and (tokenizer := _handed_on(folder, name)) is not None:
        return _with_vocabulary(tokenizer, folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:  # tokenizer files fail in many ways, each with an exception of its own
        if not is_failure(error):
            raise
        class_config(
            folder, name, trust_remote_code
        )  # which loading a tokenizer begins with: then that is to be mended
        raise UserError(
            f"model {name}: its tokenizer cannot be loaded from {folder}; {_TOKENIZER_REMEDY} ({brief(error)})",
            "tokenizer-unreadable",
        ) from error
    return _with_vocabulary(tokenizer, folder, name)


def hand_on(made: Mapping[str, bytes]) -> None:
    """Have `load_tokenizer` take tokenizers that a fork of this very process has made and pickled, by their digests, once."""
    _tried.update(made)


def forget_handed_on() -> None:
    """Let go of those that nobody has taken, tens of megabytes each: what a command loads is loaded."""
    _tried.clear()


def _handed_on(folder: Path, name: str) -> Any | None:
    """The tokenizer that was made already; None if there is none, or none that can be read."""
    if not _tried:
        return None
    digest = tokenizer_digest(folder, read_json(folder / "config.json", f"model {name}: config.json"))
    try:
        return pickle.loads(_tried.pop(digest)) if digest in _tried else None
    except (
        BaseException
    ) as error:  # as many kinds as there are tokenizers; loading it says what is wrong, if anything is
        if not is_failure(error):
            raise
        return None


def _with_vocabulary(tokenizer: Any, folder: Path, name: str) -> Any:
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes an empty one where files are missing
        raise UserError(
            f"model {name}: {folder} holds no vocabulary for its tokenizer; {_TOKENIZER_REMEDY}", "tokenizer-missing"
        )
    return tokenizer
