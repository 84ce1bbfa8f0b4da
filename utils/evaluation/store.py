"""Losses that were computed, kept on disk: each candidate's on each task's rows in a file that is written once.

A file is named after everything that its numbers depend on, so that it can be used again by whoever asks the same: after
a kill, with one more candidate, or in a search. It holds a checksum of what it says, CRC-32: a file that is not as it was
left is warned of, and what it held is computed again.
"""

import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.bounded_files import read_json
from utils.errors import UserError, warn
from utils.evaluation.candidates import Candidate
from utils.evaluation.scoring import COLUMNS, Scorer
from utils.publishing.manifest import sha256_of

_UNFINISHED = re.compile(r"tmp[a-z0-9_]{8}\.part")  # as `tempfile` calls them; others may keep theirs beside
_CHECKSUM = "crc32"
_MOST_BYTES = 2**30


class LossStore:
    """A folder of losses; made when the first are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sweep(self) -> None:
        """Remove what a killed run was writing; the caller has the folder to itself."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()

    def find(self, key: str, rows: Sequence[int]) -> dict[int, tuple[float, int]] | None:
        """Loss and tokens of these rows, by row, or None if they are not there."""
        data = self.find_record(key)
        try:
            found = {row: (math.nan if nll is None else nll, tokens) for row, nll, tokens in (data or {})["losses"]}
        except (ValueError, KeyError, TypeError):
            return None
        fits = all(type(nll) is float and type(tokens) is int for nll, tokens in found.values())
        return found if fits and found.keys() == set(rows) else None

    def find_record(self, key: str) -> dict[str, Any] | None:
        """Anything that was kept as plain data, or None if it is not there, or not as it was left."""
        path = self._path(key)
        try:
            data = read_json(path, path.name, _MOST_BYTES)
        except UserError:
            data = {}
        if data and data.pop(_CHECKSUM, None) == _checksum(data):
            return data
        if path.is_file():
            warn([f"{path} is not as it was left, or cannot be read: what it held is computed again"])
        return None

    def keep(self, key: str, described: Mapping[str, Any], losses: pd.DataFrame) -> None:
        """Write losses of one candidate on one task."""
        rows = [
            [int(row), nll if math.isfinite(nll) else None, int(tokens)]
            for row, nll, tokens in zip(losses["row"], losses["nll"], losses["tokens"], strict=True)
        ]
        self.keep_record(key, {**described, "losses": rows})

    def keep_record(self, key: str, data: Mapping[str, Any]) -> None:
        """Write plain data; whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".part", delete=False, encoding="utf-8") as file:
            try:
                json.dump({**data, _CHECKSUM: _checksum(data)}, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, self._path(key))
            except BaseException:
                os.unlink(file.name)
                raise

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:40]}.json"


def _checksum(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(dict(data), ensure_ascii=False).encode())


def score_new(
    scorer: Scorer, store: LossStore, candidates: Sequence[Candidate], rows: Mapping[str, Sequence[int]]
) -> tuple[pd.DataFrame, int]:
    """What `Scorer.score` gives, of which only what the store has not is computed.

    Returns:
        The losses, and how many candidates had to be scored.
    """
    keys = _keys(scorer, candidates, rows)
    found: dict[tuple[str, str], dict[int, tuple[float, int]]] = {}
    wanted: dict[tuple[str, ...], list[Candidate]] = {}  # candidates by the tasks that are missing
    for one in candidates:
        for task in rows:
            if (losses := store.find(keys[one.name][task], rows[task])) is not None:
                found[one.name, task] = losses
        if missing := tuple(task for task in rows if (one.name, task) not in found):
            wanted.setdefault(missing, []).append(one)

    def keep(table: pd.DataFrame) -> None:
        _keep(scorer, store, keys, table)
        for (name, task), part in table.groupby(["candidate", "task"], sort=False):
            found[name, task] = {
                row: (nll, tokens)
                for row, nll, tokens in part[["row", "nll", "tokens"]].itertuples(index=False, name=None)
            }

    for tasks, group in wanted.items():
        scorer.score(group, {task: rows[task] for task in tasks}, keep)
    table = [
        (one.name, task, row, *found[one.name, task][row]) for one in candidates for task in rows for row in rows[task]
    ]
    frame = pd.DataFrame(table, columns=list(COLUMNS)).astype({"nll": "float64"})
    return frame, sum(map(len, wanted.values()))


def unscored(
    scorer: Scorer, store: LossStore, candidates: Sequence[Candidate], rows: Mapping[str, Sequence[int]]
) -> list[Candidate]:
    """The candidates of which the store lacks something."""
    keys = _keys(scorer, candidates, rows)
    return [
        one for one in candidates if any(store.find(key, rows[task]) is None for task, key in keys[one.name].items())
    ]


def keep_losses(
    scorer: Scorer,
    store: LossStore,
    candidates: Sequence[Candidate],
    rows: Mapping[str, Sequence[int]],
    table: pd.DataFrame,
) -> None:
    """Keep what `Scorer.score` gave elsewhere, asked for the same."""
    _keep(scorer, store, _keys(scorer, candidates, rows), table)


def _keep(scorer: Scorer, store: LossStore, keys: Mapping[str, Mapping[str, str]], table: pd.DataFrame) -> None:
    for (name, task), part in table.groupby(["candidate", "task"], sort=False):
        described = {"candidate": name, "task": task, "settings": scorer.settings.record()}
        store.keep(keys[name][task], described, part)


def _keys(
    scorer: Scorer, candidates: Sequence[Candidate], rows: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, str]]:
    """The store's key of each candidate and task."""
    digests, settings = {task.name: task.digest for task in scorer.tasks}, scorer.settings.record()
    found = {}
    for one in candidates:
        mark = scorer.fingerprint(one)  # of weights: once for all tasks
        found[one.name] = {
            task: sha256_of([mark, digests[task], list(numbers), settings]) for task, numbers in rows.items()
        }
    return found
