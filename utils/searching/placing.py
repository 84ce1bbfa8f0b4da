"""Candidates side by side on several devices: each device's scorer takes its share of them, rows and results are the same."""

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from utils.evaluation.candidates import Candidate
from utils.evaluation.store import LossStore, score_new

if TYPE_CHECKING:
    import pandas as pd

    from utils.evaluation.scoring import Scorer


def score_side_by_side(
    scorers: "Sequence[Scorer]", store: LossStore, candidates: Sequence[Candidate], rows: Mapping[str, Sequence[int]]
) -> "pd.DataFrame":
    """Losses as one scorer gives them, computed by as many as there are; what the store has is not computed.

    While transformers builds a model, torch's default dtype and the registration of parameters are other ones for the
    whole process. So nothing is built while threads score: skeletons before, candidates that are written first after.

    Raises:
        UserError: what a scorer raises; the others finish first, and what they scored is kept.
    """
    if len(scorers) == 1 or len(candidates) == 1:
        return score_new(scorers[0], store, candidates, rows)[0]

    import pandas as pd

    alone = scorers[0].make_ready(candidates)
    together = [one for one in candidates if one.name not in alone]
    shares = [together[place :: len(scorers)] for place in range(len(scorers))]
    pairs = [(scorer, share) for scorer, share in zip(scorers, shares, strict=True) if share]
    for scorer, share in pairs[1:]:
        scorer.make_ready(share)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(pairs)), thread_name_prefix="score") as pool:
        tables = list(pool.map(lambda pair: score_new(pair[0], store, pair[1], rows)[0], pairs))
    if alone:
        written = [one for one in candidates if one.name in alone]
        tables.append(score_new(scorers[0], store, written, rows)[0])
    found = {name: part for table in tables for name, part in table.groupby("candidate", sort=False)}
    return pd.concat([found[one.name] for one in candidates], ignore_index=True)
