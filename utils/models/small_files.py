"""The small files of a model folder that libraries read or a merge copies, looked at before either is done.

Whoever made a folder may have put pipes, devices or links there. What is read must be a regular file of bounded size;
what is copied into a result must lie in the folder, or be one of the hub cache's own blobs: a link could bring a private
file into what is published.
"""

import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from utils.bounded_files import read_bounded, read_json
from utils.errors import UserError

SMALL_FILES = ("README.md", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken")
TEMPLATE_FOLDER = "additional_chat_templates"
MOST_BYTES = 256 * 2**20  # of a small file: the largest vocabularies take 40 MB
MOST_JSON = 8 * 2**20  # a larger one is a vocabulary, which is loaded before it is published
MOST_TOKEN_ID = 2**26
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LARGE_NUMBER = re.compile(rb'(?::|")\s*\d{8,}')


def check_small_files(folder: Path, name: str) -> None:
    """Check every small file that lies in a model folder.

    Args:
        folder: the model folder.
        name: what to call the model.

    Raises:
        UserError: one is a pipe, a device, a broken link, or too large; a tokenizer has a token id beyond any vocabulary.
    """
    paths = [path for path in folder.iterdir() if any(fnmatch(path.name, form) for form in SMALL_FILES)]
    for path in sorted([*paths, *folder.glob(f"{TEMPLATE_FOLDER}/*")]):
        where = f"model {name}: {path.relative_to(folder)}"
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}", "model-small-file") from error
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{where} is not a regular file; put a copy of the file there", "model-small-file")
        if found.st_size > MOST_BYTES:
            raise UserError(f"{where} is larger than {MOST_BYTES >> 20} MiB: is it the right file?", "model-small-file")
    for file in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            _check_token_ids(folder / file, f"model {name}: {file}")


def check_copied(folder: Path, names: Iterable[str]) -> None:
    """Check the files of a model folder that are to be copied into a result; names that are not there are passed over.

    Raises:
        UserError: a file is linked from elsewhere, or calls itself JSON and is not: NaN and infinity, which Python writes and
            reads, are none to others.
    """
    root = folder.resolve()
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        target = path.resolve()
        if root not in target.parents and not _is_blob(target):
            raise UserError(
                f"{path} is a link to {target}, outside the model's folder; what a merge copies must lie in it: put a "
                "copy in the link's place",
                "model-link-outside",
            )
        if path.suffix == ".json" and target.stat().st_size <= MOST_JSON:
            read_json(path, str(path), MOST_JSON, finite=True)


def _is_blob(target: Path) -> bool:
    """Whether a file is one of the hub cache's, which links to them from its folders."""
    holder = target.parent
    named = bool(_BLOB.fullmatch(target.name))
    return named and holder.name == "blobs" and re.match(r"(models|datasets)--", holder.parent.name) is not None


def _check_token_ids(path: Path, where: str) -> None:
    content = read_bounded(path, where, MOST_BYTES)
    if not _LARGE_NUMBER.search(content):
        return
    highest = max(_token_ids(read_json(path, where, MOST_BYTES), path.name), default=0)
    if highest > MOST_TOKEN_ID:
        raise UserError(f"{where} has a token with the id {highest}, beyond any vocabulary", "tokenizer-token-id")


def _token_ids(data: Mapping[str, Any], file: str) -> Iterator[int]:
    """Every token id in a tokenizer's file, wherever the file's format has them."""
    if file == "tokenizer_config.json":
        decoder = data.get("added_tokens_decoder")
        yield from (int(key[:25]) for key in decoder or () if isinstance(key, str) and key.isdecimal())
        return
    model = data.get("model")
    vocabulary = data if file == "added_tokens.json" else model.get("vocab") if isinstance(model, dict) else None
    added = data.get("added_tokens")
    found = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    found += [one.get("id") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    yield from (one for one in found if type(one) is int)
