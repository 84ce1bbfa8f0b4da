"""Where Optuna keeps a study: one SQLite file in the search's folder."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief

if TYPE_CHECKING:
    import optuna

STORAGE = "study.db"


def require_optuna() -> Any:
    """Import Optuna, its chatter off.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError(
            "the search needs Optuna: pip install -r requirements-search.txt", "search-optuna-missing"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def storage_guarded(folder: Path) -> Iterator[None]:
    """Turn what SQLite cannot do into a `UserError`: a file that is no study, a full disk."""
    optuna = require_optuna()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        why = brief(getattr(cause, "orig", None) or cause or error, 120)
        raise UserError(
            f"{folder / STORAGE}, the search's storage, cannot be used ({why}). If the disk is full, free some and type the "
            "command again: it goes on. If the file is no study, move it or choose another --out_dir",
            "search-storage-unusable",
        ) from error


def open_storage(folder: Path) -> "optuna.storages.RDBStorage":
    """The folder's storage, made if needed.

    SQLite waits for the disk at checkpoints alone: a trial is some thirty commits, half a second on a slow disk. A kill of
    the process loses nothing then, a power cut the last commits, but not the file.
    """
    from sqlalchemy import event

    storage = require_optuna().storages.RDBStorage(f"sqlite:///{(folder / STORAGE).resolve()}")

    @event.listens_for(storage.engine, "connect")
    def _on_connect(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()  # connections made before; the next one listens
    return storage


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without Optuna's warnings of what is experimental, or of knowns outside a range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
