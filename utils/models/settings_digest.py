"""Which settings a checkpoint has: what its weights mean beside their numbers.

Two models of the same weights compute something else once an epsilon, a base of rotary positions or a list of layer types is
another one.
"""

from utils.models.checkpoints import Checkpoint
from utils.publishing.manifest import file_sha256, sha256_of

_NOTES = ("_name_or_path", "transformers_version")  # of whoever saved the file; nothing is computed by them


def settings_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over a checkpoint's `config.json`, whatever the order of its keys, and the Python code in its folder.

    The same for a copy. Tokenizers have one of their own (`utils/models/tokenizer.py`).
    """
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOTES}
    code = {path.name: file_sha256(path) for path in checkpoint.folder.glob("*.py") if path.is_file()}
    return sha256_of([config, code])
