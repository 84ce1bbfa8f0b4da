"""How many tokens of its text each expert of a mixture was given: a table of the methods that measure experts on them.

| file | content |
|---|---|
| `expert_tokens.csv` | model of the pair, block, module of `experts` in it, and number of the `expert`: the `tokens` of the model's text that were routed to it, on average of the models that were measured on it; empty where an architecture does not show them |
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.guidance.columns import TableFormat, expert, number, read_listed, text, whole
from utils.guidance.few_tokens import EXPERT_TOKENS, fewest_tokens
from utils.guidance.measure_job import TOKENS

Rows = Sequence[tuple]
_TABLE = TableFormat(
    TOKENS,
    (expert("model"), whole("layer"), text("experts"), whole("expert"), number("tokens", blank=True)),
    key=("model", "layer", "experts", "expert"),
)


def token_rows(model: str, layer: int, experts: str, tokens: Sequence[float | None]) -> Iterator[tuple]:
    """The rows of one stack's experts."""
    return ((model, layer, experts, number, count) for number, count in enumerate(tokens))


def token_files(rows: Rows) -> dict[str, bytes]:
    """The table, if there are mixtures."""
    return {TOKENS: _TABLE.content(rows)} if rows else {}


def read_tokens(folder: Path, manifest: Mapping[str, Any] | None, experts: Sequence[str]) -> pd.DataFrame | None:
    """The table of a dataframe folder; None where its measurement has none.

    Raises:
        UserError: as `read_tables`.
    """
    return read_listed(folder, manifest, _TABLE, experts)


def read_fewest(manifest: Mapping[str, Any] | None) -> int:
    """The number of tokens below which a measurement took experts towards the mean of their layer.

    Raises:
        UserError: the manifest has something else there.
    """
    options = (manifest or {}).get("guidance_options")
    fewest = fewest_tokens(options if isinstance(options, dict) else {})
    if isinstance(fewest, bool) or not isinstance(fewest, int) or fewest < 0:
        raise UserError(
            f"manifest.json: guidance_options.{EXPERT_TOKENS} is {fewest!r}, not a whole number from 0 on; measure again with "
            "--overwrite",
            "manifest-value",
        )
    return fewest


def few_tokens_lines(rows: Rows | pd.DataFrame, fewest: int) -> list[str]:
    """A sentence for each model of whose experts some were taken towards the mean of their layer.

    Args:
        rows: of the table.
        fewest: the number of tokens below which they are; 0: none is.
    """
    table, lines = rows if isinstance(rows, pd.DataFrame) else _TABLE.frame(rows), []
    for model, own in table.groupby("model", sort=False) if fewest else ():
        tokens = own["tokens"].astype("float64")
        if few := int((tokens < fewest).sum()):
            lines.append(
                f"{model}: {few} of {len(own)} experts of its mixtures were given fewer than {fewest} tokens of the text "
                f"({int((tokens == 0).sum())} none) and are taken towards the mean of their layer (--{EXPERT_TOKENS}; "
                f"{TOKENS} has their tokens)"
            )
        if hidden := int(tokens.isna().sum()):
            lines.append(
                f"{model}: how many tokens were given to {hidden} of {len(own)} experts cannot be seen; they are taken as "
                "measured"
            )
    return lines
