"""Where candidates are scored: on one device, side by side on several, or as tasks of a cluster; losses are the same bits."""

import concurrent.futures
import math
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from utils.errors import UserError
from utils.evaluation.candidates import Candidate
from utils.evaluation.scoring import COLUMNS, Scorer
from utils.evaluation.store import LossStore, keep_losses, score_new, unscored
from utils.publishing.disk import remove_tree
from utils.publishing.manifest import sha256_of
from utils.workers.piece import Piece, Place
from utils.workers.ray_cluster import RayWorkers

Rows = Mapping[str, Sequence[int]]
_MOST_A_TASK = 16  # candidates; a machine that is lost costs no more of them


@dataclass(frozen=True)
class Cluster:
    """A cluster that scores, and the folder of its tasks' results, which all its machines see."""

    workers: RayWorkers
    folder: Path


def score_placed(
    scorers: Sequence[Scorer],
    store: LossStore,
    candidates: Sequence[Candidate],
    rows: Rows,
    cluster: Cluster | None = None,
) -> tuple[pd.DataFrame, int]:
    """Losses as one scorer gives them, computed by as many as there are; what the store has is not computed.

    Args:
        scorers: one for each device; of a cluster the one that knows what is scored.
        store: what was scored so far; this process alone writes it.
        candidates, rows: as `Scorer.score`.
        cluster: who scores in the place of this process.

    Returns:
        The losses, and how many candidates had to be scored.

    Raises:
        UserError: what a scorer raises; the others finish first, and what they scored is kept.
    """
    if cluster is not None:
        scored = _score_on_cluster(cluster, scorers[0], store, candidates, rows)
        return score_new(scorers[0], store, candidates, rows)[0], scored
    if len(scorers) == 1 or len(candidates) == 1:
        return score_new(scorers[0], store, candidates, rows)
    return _score_side_by_side(scorers, store, candidates, rows)


def _score_side_by_side(
    scorers: Sequence[Scorer], store: LossStore, candidates: Sequence[Candidate], rows: Rows
) -> tuple[pd.DataFrame, int]:
    """Each device's scorer takes its share of the candidates, in a thread.

    While transformers builds a model, torch's default dtype and the registration of parameters are other ones for the
    whole process. So nothing is built while threads score: skeletons before, candidates that are written first after.
    """
    alone = scorers[0].make_ready(candidates)
    together = [one for one in candidates if one.name not in alone]
    shares = [together[place :: len(scorers)] for place in range(len(scorers))]
    pairs = [(scorer, share) for scorer, share in zip(scorers, shares, strict=True) if share]
    for scorer, share in pairs[1:]:
        scorer.make_ready(share)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(pairs)), thread_name_prefix="score") as pool:
        done = list(pool.map(lambda pair: score_new(pair[0], store, pair[1], rows), pairs))
    if alone:
        written = [one for one in candidates if one.name in alone]
        done.append(score_new(scorers[0], store, written, rows))
    found = {name: part for table, _ in done for name, part in table.groupby("candidate", sort=False)}
    return pd.concat([found[one.name] for one in candidates], ignore_index=True), sum(scored for _, scored in done)


def _score_on_cluster(
    cluster: Cluster, scorer: Scorer, store: LossStore, candidates: Sequence[Candidate], rows: Rows
) -> int:
    """Have the cluster score what the store has not, and keep it there as it comes; returns how many candidates that was.

    How they are put together into tasks depends on the cluster, the losses do not.
    """
    wanted = unscored(scorer, store, candidates, rows)
    if not wanted:
        return 0

    size = max(1, min(_MOST_A_TASK, math.ceil(len(wanted) / cluster.workers.at_once)))
    groups = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    what = pickle.dumps((scorer.config, tuple(scorer.tasks), scorer.settings, scorer.settings.record()))
    plain = {task: list(numbers) for task, numbers in rows.items()}
    pieces = [
        Piece(_name(scorer, group, rows), score_piece, (what, group, plain), 1, group[0].name) for group in groups
    ]
    spent = [0.0, 0.0]

    def on_result(piece: Piece, result: Mapping[str, Any]) -> None:
        table = pd.DataFrame(result["losses"], columns=list(COLUMNS)).astype({"nll": "float64"})
        keep_losses(scorer, store, piece.arguments[1], rows, table)
        for place, seconds in enumerate(result["seconds"]):
            spent[place] += seconds
        for line in result["said"]:
            scorer.say(line)
        remove_tree(cluster.folder / piece.name)

    start = time.perf_counter()
    cluster.workers.run(pieces, cluster.folder, lambda label, steps: None, on_result)
    share = (time.perf_counter() - start) / max(sum(spent), 1e-9)  # of the tasks' time: what has passed meanwhile
    scorer.seconds.weights += share * spent[0]
    scorer.seconds.forward += share * spent[1]
    return len(wanted)


def _name(scorer: Scorer, group: Sequence[Candidate], rows: Rows) -> str:
    parts = [[scorer.fingerprint(one) for one in group], {task: list(numbers) for task, numbers in rows.items()}]
    return sha256_of(parts)[:20]


def score_piece(place: Place, what: bytes, candidates: Sequence[Candidate], rows: Rows) -> dict[str, Any]:
    """Losses of some candidates as a task of a cluster gives them: plain rows, the seconds it took, what there is to say."""
    said: list[str] = []
    scorer = _scorer(what, str(place.device))
    scorer.say = said.append
    before = scorer.seconds.weights, scorer.seconds.forward
    table = scorer.score(candidates, rows)
    place.on_step(0)
    return {
        "losses": [list(row) for row in table.itertuples(index=False, name=None)],
        "seconds": [scorer.seconds.weights - before[0], scorer.seconds.forward - before[1]],
        "said": said,
    }


@lru_cache(maxsize=1)
def _scorer(what: bytes, device: str) -> Scorer:
    """A scorer in a task's process, kept for its next task.

    Raises:
        UserError: this machine would not give the same losses.
    """
    config, tasks, settings, expected = pickle.loads(what)
    merge = replace(settings.merge, device=device)
    scorer = Scorer(config, tasks, replace(settings, device=torch.device(device), merge=merge))
    if (found := scorer.settings.record()) != expected:
        unlike = ", ".join(f"{key} {found[key]} and {expected[key]}" for key in expected if found[key] != expected[key])
        raise UserError(
            f"the machines of the cluster would not give the same losses ({unlike}); give --dtype, or take machines of one "
            "kind",
            "workers-losses-differ",
        )
    return scorer
