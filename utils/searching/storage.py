"""Where Optuna keeps a study: one SQLite file in the search's folder."""

import contextlib
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief

if TYPE_CHECKING:
    import optuna

STORAGE = "study.db"
_TABLES = ("stud", "trial", "version_info", "alembic_version")  # how the names of Optuna's tables begin


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

    Raises:
        UserError: what lies there is a link, or somebody's database of another kind.
    """
    from sqlalchemy import event

    _refuse_others(folder / STORAGE)
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


def _refuse_others(path: Path) -> None:
    """Raise a `UserError` where tables would be put into a database that is no study; nothing is written."""
    if path.is_symlink():
        what = "is a link, and a search changes the file that it leads to"
    elif path.is_file() and (tables := _tables(path)) and not any(name.startswith(_TABLES) for name in tables):
        what = f"is a database of something else: it holds {min(tables)}"
    else:
        return
    raise UserError(f"{path} {what}; move it away, or choose another --out_dir", "search-storage-foreign")


def _tables(path: Path) -> set[str]:
    """Names of a database's tables as they are in the file itself, without those that wait beside it since a kill."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)) as database:
            return {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.DatabaseError:  # which Optuna is going to meet as well
        return set()
