"""Whether the base's routers would send an expert's tokens where its own send them: a table of any guidance that runs experts.

| file | content |
|---|---|
| `routing.csv` | expert and mixture of a block: `tokens`, how many experts each is given (`chosen`), `same`: the share of tokens whose set of experts stays with the base's router on the same input, `common`: the share of all choices that stay; empty where an architecture's choices cannot be seen |
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from utils.guidance.columns import TableFormat, expert, number, read_listed, text, whole
from utils.guidance.measure_job import ROUTING, MeasureJob
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.routing import RouterComparison
from utils.passes.subjects import Subject

if TYPE_CHECKING:
    import torch

Rows = Sequence[tuple]
_TABLE = TableFormat(
    ROUTING,
    (
        expert("model"), whole("layer"), text("mixture", blank=True), whole("tokens"), whole("chosen"),
        number("same", blank=True), number("common", blank=True),
    ),
    key=("model", "layer", "mixture"),
)  # fmt: skip


@contextmanager
def compared_routers(
    job: MeasureJob, subject: Subject, base: Subject, device: "torch.device"
) -> Iterator[RouterComparison]:
    """A comparison of a model's routers with the base's, in the model's own dtype; closed at the end."""
    routers = RouterComparison(subject.decoder, job.open_weights(replace(base, dtype=subject.dtype), device))
    try:
        yield routers
    finally:
        routers.close()


def keep_routing(snapshots: GradientSnapshots, routers: RouterComparison, device: "torch.device") -> None:
    """Go on from the comparison of a killed run, and have this one kept."""
    if (found := snapshots.found("routers")) is not None:
        routers.restore(found, device)
    snapshots.keep("routers", routers.state)


def routing_rows(model: str, routers: RouterComparison) -> list[tuple]:
    """The rows of an expert."""
    return [(model, *astuple(one)) for one in routers.found()]


def routing_files(rows: Rows) -> dict[str, bytes]:
    """The table, if there are mixtures."""
    return {ROUTING: _TABLE.content(rows)} if rows else {}


def read_routing(folder: Path, manifest: Mapping[str, Any] | None, experts: Sequence[str]) -> pd.DataFrame | None:
    """The table of a dataframe folder; None where its measurement has none.

    Raises:
        UserError: as `read_tables`.
    """
    return read_listed(folder, manifest, _TABLE, experts)


def routing_lines(rows: Rows | pd.DataFrame) -> list[str]:
    """A sentence for each expert."""
    table = rows if isinstance(rows, pd.DataFrame) else _TABLE.frame(rows)
    return [f"{model}: {_said(own)}" for model, own in table.groupby("model", sort=False)]


def _said(own: pd.DataFrame) -> str:
    own = own.astype({"same": "float64", "common": "float64"})
    known, hidden = own[own["same"].notna()], own[own["same"].isna()]
    if known.empty:
        return (
            "how many tokens would keep their experts with the base's router is not known: how this architecture chooses "
            "them cannot be seen"
        )
    least = known.loc[known["same"].idxmin()]
    chosen = sorted({int(one) for one in known["chosen"]})
    said = (
        f"{known['same'].mean():.1%} of its tokens keep their {' or '.join(map(str, chosen))} experts with the base's router "
        f"(least {least['same']:.1%}, in layer {int(least['layer'])}), {known['common'].mean():.1%} of all choices stay"
    )
    layers = ", ".join(str(int(one)) for one in hidden["layer"])
    return said + (f"; not known in layer {layers}" if layers else "")
