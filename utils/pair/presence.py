"""What a pair config names on this machine: is it there? A typing error shows before libraries load and files are read."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.errors import Problem, UserError, raise_collected
from utils.models.checkpoints import find_small_files, is_local, local_folder, read_model_config
from utils.models.low_rank import adapter_name
from utils.pair.calibration import with_defaults
from utils.pair.config import ModelEntry, PairConfig
from utils.pair.rows import data_file, looks_like_file
from utils.pair.source import CalibrationSource


def refuse_missing(config: PairConfig, texts: Iterable[CalibrationSource] = ()) -> None:
    """Refuse model folders (by their config.json) and text files that are not there; hub ids are left to the download.

    Args:
        config: the pair config.
        texts: which texts are needed beside those that experts are measured on.

    Raises:
        UserError: what is missing, all of it in one message.
    """
    problems = []
    for entry in config.model_info:
        problems += _refusal(_check_model, entry)
    for text in dict.fromkeys((*config.texts, *texts)):
        path = with_defaults(text).path
        if path is not None and looks_like_file(path):
            problems += _refusal(data_file, path)
    raise_collected(problems, f"pair config {config.path}")


def small_files(config: PairConfig, others: Iterable[tuple[str, str | None]] = ()) -> Iterator[tuple[str, Path]]:
    """Name and folder of every model whose small files can be read; what is wrong with another is said in its turn.

    `others` are names and revisions of models beside those of the pair.
    """
    for name, revision in [*((entry.name, entry.revision) for entry in config.model_info), *others]:
        with contextlib.suppress(UserError):
            folder = find_small_files(name, revision)
            read_model_config(folder, name)
            yield name, folder


def _check_model(entry: ModelEntry) -> None:
    parts = adapter_name(entry.name)
    model = entry.name if parts is None else parts.model
    if parts is not None and is_local(parts.adapter):
        local_folder(parts.adapter)
    if is_local(model):
        read_model_config(local_folder(model, entry.revision), entry.name)


def _refusal(check: Callable[[Any], object], asked: Any) -> list[Problem]:
    try:
        check(asked)
    except UserError as error:
        return [Problem(str(error), error.code)]
    return []
