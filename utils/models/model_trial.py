"""A model's small files given to transformers in a fork first: its config, tokenizer and chat template.

A large vocabulary takes seconds to load. What the fork has made of it comes back pickled, which takes a third of that.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.models.headers import INDEX
from utils.models.tokenizer import hand_on, tokenizer_digest
from utils.models.tokenizer_files import GENERATION
from utils.publishing.manifest import file_sha256
from utils.runtime import import_libraries
from utils.trial import Begin, Trial

_TEXT = "The quick brown fox, 0123456789: don't... \u00fcber\n\n    x = y  " + "aA1 " * 50
# What every model class imports. It takes seconds, which this process needs anyway and the fork must not need again.
_LIBRARIES = (
    "accelerate",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
_CHAT = ({"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4."})


class ModelTrial:
    """Every model's small files in one fork, which begins once the libraries that models need are imported."""

    def __init__(
        self, models: Iterable[tuple[str, Path]], *, tokenizers: bool = True, loaded_again: bool = True
    ) -> None:
        """Begin with models, each with its name and folder; equal configs, and equal tokenizers, count once.

        Without `tokenizers` configs alone are tried. `loaded_again`: whether this process will load tokenizers, too.
        """
        import_libraries(*_LIBRARIES)
        works: dict[str, tuple[str, Path, _Work]] = {}  # by digest of what is tried
        for name, folder in models:
            files = {path.name: path for path in sorted(folder.iterdir()) if _is_small(path)}
            settings = [path for file, path in files.items() if file in _SETTINGS]
            works.setdefault(_same(settings), (name, folder, _build))
            if tokenizers:
                works.setdefault(_tokenizer(folder, name), (name, folder, _encode))
        self._trial = Trial(lambda begin: pickle.dumps(_try_all(works, begin, loaded_again)))

    def check(self) -> None:
        """Wait for the end.

        Raises:
            UserError: transformers hangs, crashes or takes too much memory over a model's files.
        """
        if failure := self._trial.failure():
            raise UserError(f"{failure}; is this model from a source you trust?", "model-breaks-libraries")
        made, self._trial.made = self._trial.made, b""  # the trial itself is there until the process ends
        if made:
            hand_on(pickle.loads(made))


_Work = Callable[[Path, Begin], Any]
_SETTINGS = ("config.json", GENERATION)
LARGE = 2**20  # bytes of small files from which on loading a tokenizer a second time is worth sparing


def _try_all(works: Mapping[str, tuple[str, Path, _Work]], begin: Begin, pickled: bool) -> dict[str, bytes]:
    """Do all works; if they are wanted, the large tokenizers that were made, pickled, by their digests."""
    made = {}
    for digest, (name, folder, work) in works.items():
        size = sum(path.stat().st_size for path in folder.iterdir() if _is_small(path))
        try:
            found = work(folder, lambda what, name=name, size=size: begin(f"model {name}: {what}", size))
            if pickled and found is not None and size > LARGE:
                made[digest] = pickle.dumps(found)
        except MemoryError:
            raise
        except Exception:  # which the command itself will meet, and say
            continue
    return made


def _build(folder: Path, begin: Begin) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    begin("loading its config.json")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    begin("building what its config.json describes")
    with init_empty_weights(include_buffers=False):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _encode(folder: Path, begin: Begin) -> Any:
    from transformers import AutoTokenizer

    begin("loading its tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    begin("encoding a line by its tokenizer")
    tokenizer(_TEXT)
    if tokenizer.chat_template:
        begin("rendering a conversation by its chat template")
        tokenizer.apply_chat_template(list(_CHAT), tokenize=False)
    return tokenizer


def _is_small(path: Path) -> bool:
    return path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file() and path.name != INDEX


def _tokenizer(folder: Path, name: str) -> str:
    """Equal for equal tokenizers."""
    try:
        config = read_json(folder / "config.json", f"model {name}: config.json")
    except UserError:  # which the command itself will meet, and say
        config = {}
    return tokenizer_digest(folder, config)


def _same(files: Iterable[Path]) -> str:
    """Equal for files that are called the same and hold the same."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()
