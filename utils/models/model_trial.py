"""A model's small files given to transformers in a fork first: its config, tokenizer and chat template."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from utils.errors import UserError
from utils.models.headers import INDEX
from utils.publishing.manifest import file_sha256
from utils.runtime import import_libraries
from utils.trial import Trial

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

    def __init__(self, models: Iterable[tuple[str, Path]]) -> None:
        """Begin with models, each with its name and folder; those with equal files count once."""
        import_libraries(*_LIBRARIES)
        distinct = {_same(folder): (name, folder) for name, folder in reversed(list(models))}
        self._trial = Trial(lambda begin: _try_all(list(distinct.values()), begin))

    def check(self) -> None:
        """Wait for the end.

        Raises:
            UserError: transformers hangs, crashes or takes too much memory over a model's files.
        """
        if failure := self._trial.failure():
            raise UserError(f"{failure}; is this model from a source you trust?", "model-breaks-libraries")


def _try_all(models: list[tuple[str, Path]], begin: Callable[[str], None]) -> None:
    for name, folder in models:
        for what, work in (
            ("config.json", _build),
            ("tokenizer", _encode),
        ):
            begin(f"model {name}: loading its {what}")
            try:
                work(folder, lambda what, name=name: begin(f"model {name}: {what}"))
            except MemoryError:
                raise
            except Exception:  # which the command itself will meet, and say
                continue


def _build(folder: Path, begin: Callable[[str], None]) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    begin("building what its config.json describes")
    with init_empty_weights(include_buffers=False):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _encode(folder: Path, begin: Callable[[str], None]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    begin("encoding a line by its tokenizer")
    tokenizer(_TEXT)
    if tokenizer.chat_template:
        begin("rendering a conversation by its chat template")
        tokenizer.apply_chat_template(list(_CHAT), tokenize=False)


def _same(folder: Path) -> str:
    """Equal for folders whose small files are the same."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file() and path.name != INDEX:
            digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()
