"""Our own: what may be kept of a fine-tune goes where its entries matter most to the loss.

    F_ij     = sum over samples of (dL/dW_ij)^2         on the expert's own text, at base, expert, or both added up
    saliency = delta_ij^2 F_ij                          delta = expert - base
    density(tensor) = share of its entries above a threshold, one for all measured tensors of an expert, so that the
                      mean density is the budget

Saliency is, up to a factor, the second-order estimate of what the loss loses with an entry of the change (optimal brain
damage, with squared gradients for the curvature). The *measure* half stores histograms of it per tensor, so that any
budget can be solved later, and F as one vector per axis; the *decide* half solves the budget. Inside a tensor the plain
recipe keeps the entries of largest magnitude, as every `ties` does; with `--mask saliency` the recipe names the vectors
and this project's merge method `guided_ties`, which keeps those of largest delta^2 F.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from utils.coefficients import coefficient_table
from utils.decide_job import DecideJob, Decision
from utils.errors import UserError
from utils.frames import csv_bytes
from utils.guidance_method import GuidanceMethod, Measured, MethodFlag
from utils.measure_job import MeasureJob, OnBlock, Work
from utils.method_rules import GUIDED_TIES
from utils.naming import Naming, Recorded, name_recorded
from utils.pair_config import PairConfig
from utils.runtime import gigabytes
from utils.saliency_tables import (
    COLUMNS,
    HISTOGRAM,
    TENSORS,
    ExpertSaliency,
    read_saliency,
    read_vectors_of,
    vector_file,
)
from utils.saliency_vectors import vector_file_bytes
from utils.subjects import Subject

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from utils.saliency_histograms import SaliencyHistogram
    from utils.squared_gradients import ComponentSquares

POINTS = ("base", "expert", "both")
MASKS = ("magnitude", "saliency")
_USUAL_BUDGET = 0.4  # in the middle of what LEWIS's densities of 0.3 to 0.8 come to on average, 0.34 to 0.47
_SILENT = 0.1  # share of the changed entries without any gradient from which on something is wrong


@dataclass(frozen=True)
class _Measurement:
    """What one expert's pass gave: rows of the two tables, vectors by tensor, losses at base and expert."""

    tensors: list[tuple]
    bins: list[tuple]
    vectors: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]"
    losses: tuple[tuple[float, ...], tuple[float, ...]]


def _files(config: PairConfig) -> tuple[str, ...]:
    return (TENSORS, HISTOGRAM, *(vector_file(entry.type) for entry in config.experts))


def _at(job: MeasureJob, expert: Subject) -> tuple[Subject, ...]:
    """The models whose gradients are taken."""
    return {"base": (job.base,), "expert": (expert,), "both": (job.base, expert)}[job.options["gradient_at"]]


def _choices(job: MeasureJob) -> list[str]:
    parts = job.base.decoder.components
    found = []
    for expert in job.experts:
        sizes = [
            job.text(subject, expert).tokens
            * len(subject.decoder.blocks)
            * subject.decoder.model.config.get_text_config(decoder=True).hidden_size
            * subject.dtype.itemsize
            for subject in _at(job, expert)
        ]
        weights = [job.base.decoder.blocks[0].get_submodule(part.path).weight.numel() for part in parts]
        found.append(sum(sizes) + 4 * sum(weights))
    point = {"base": "at the base", "expert": "at each expert", "both": "at the base and at each expert, added up"}
    return [
        f"components: {', '.join(part.name for part in parts)} "
        f"({'as configured' if job.config.components else 'every linear part of a block'})",
        f"gradients: {point[job.options['gradient_at']]}, sample by sample, block by block; beside what is said below, up "
        f"to {gigabytes(max(found))} for hidden states at every block's entrance and one block's squared gradients",
    ]


def _measure(job: MeasureJob) -> Measured:
    """Saliencies of every expert on its own text."""
    import pandas as pd

    from utils.language_head import require_head

    works = []
    for expert in job.experts:
        for subject in _at(job, expert):
            if subject.headers is not None:
                require_head(subject.decoder, subject.headers, f"model {subject.entry.name}")
        # A skeleton of its own for each work: works may run side by side, and weights are placed into it.
        pair = tuple(_own_skeleton(subject) for subject in (job.base, expert))
        blocks = 2 * len(_at(job, expert)) * len(expert.decoder.blocks)
        works.append(Work(expert.entry.type, blocks, partial(_saliencies, job, *pair)))
    measured = dict(zip((expert.entry.type for expert in job.experts), job.run(works), strict=True))
    rows = {
        TENSORS: [row for one in measured.values() for row in one.tensors],
        HISTOGRAM: [row for one in measured.values() for row in one.bins],
    }
    tables = {name: pd.DataFrame(rows[name], columns=list(columns)) for name, columns in COLUMNS.items()}
    files = {name: csv_bytes(table) for name, table in tables.items()}
    files |= {vector_file(name): vector_file_bytes(one.vectors) for name, one in measured.items()}
    notes, warnings = [], []
    for expert in job.experts:
        name = expert.entry.type
        own = tables[TENSORS][tables[TENSORS]["model"] == name]
        notes.append(_note(name, own, measured[name].losses))
        warnings += _doubts(expert, own)
    return Measured(files, tuple(notes), tuple(warnings))


def _own_skeleton(subject: Subject) -> Subject:
    return replace(subject, decoder=copy.deepcopy(subject.decoder))


def _saliencies(
    job: MeasureJob, base: Subject, expert: Subject, device: "torch.device", on_block: OnBlock
) -> _Measurement:
    from utils.row_column_factors import explained_share, row_column_factors
    from utils.saliency_histograms import saliency_histogram
    from utils.squared_gradients import Side, squares_pass

    sides = []
    for subject, points in ((base, ("base", "both")), (expert, ("expert", "both"))):
        samples = job.text(subject, expert).encoded if job.options["gradient_at"] in points else None
        sides.append(Side(subject.decoder, job.open_weights(subject, device), samples))
    name = expert.entry.type
    tensors, bins, vectors = [], [], {}
    with squares_pass(*sides, device, on_block) as both:
        for part in both.parts:
            tensor = base.stored_name(base.decoder.weight_name(part.layer, part.component))
            try:
                histogram = saliency_histogram(part.base, part.expert, part.squares)
            except ValueError:
                raise UserError(
                    f"{tensor}: the weights of {base.entry.name} or {expert.entry.name}, or their gradients, are not "
                    f"finite in {expert.dtype}; check the checkpoints, or use --dtype float32 or bfloat16"
                ) from None
            vectors[tensor] = row_column_factors(part.squares)
            explained = explained_share(part.squares, *vectors[tensor])
            tensors.append(_tensor_row(name, tensor, part, histogram, explained))
            full = histogram.counts.nonzero().flatten().tolist()
            bins += [(name, tensor, number, int(histogram.counts[number])) for number in full]
        return _Measurement(_by_layer(tensors), bins, vectors, both.losses)


def _tensor_row(
    model: str, tensor: str, part: "ComponentSquares", histogram: "SaliencyHistogram", explained: float
) -> tuple:
    place = (model, part.layer, part.component.name, tensor, part.base.numel())
    return (*place, histogram.changed, histogram.zeros, histogram.norm, explained)


def _by_layer(rows: list[tuple]) -> list[tuple]:
    """Rows in the order of the layers; they were measured from the last to the first."""
    return sorted(rows, key=lambda row: row[COLUMNS[TENSORS].index("layer")])


def _note(model: str, tensors: "pd.DataFrame", losses: Sequence[tuple[float, ...]]) -> str:
    shown = [
        f"{sum(values) / len(values):.4f} at {point}"
        for point, values in zip(("the base", "the expert"), losses, strict=True)
        if values
    ]
    explained = tensors["explained"]
    return (
        f"{model}: loss {', '.join(shown)} (nats per token on its own text, {len(max(losses, key=len))} samples); two "
        f"vectors per tensor explain {explained.median():.0%} of the variance of log F (median over tensors; least "
        f"{explained.min():.0%})"
    )


def _doubts(expert: Subject, tensors: "pd.DataFrame") -> list[str]:
    changed = int(tensors["changed"].sum())
    if not changed:
        return [f"{expert.entry.name} has exactly the base's weights in all that was measured; is it the same model?"]
    silent = (tensors["changed"] - (tensors["params"] - tensors["zeros"])).sum() / changed
    if silent < _SILENT:
        return []
    return [
        f"{silent:.0%} of the entries that {expert.entry.name} changed have no gradient on this text in {expert.dtype}; "
        "more samples or --dtype float32 or bfloat16 may help"
    ]


def _decide(job: DecideJob) -> Decision:
    """Densities that spend the budget on the largest saliencies."""
    import pandas as pd

    by_saliency = job.options["mask"] == "saliency"
    if by_saliency and job.merge_method != "ties":
        raise UserError(
            f"--mask saliency cannot be used with --merge_method {job.merge_method}: only {GUIDED_TIES.name}, this "
            "project's ties, selects entries by saliency; give --merge_method ties, or leave out --mask"
        )
    experts = [entry.type for entry in job.experts]
    measured = read_saliency(job.folder, experts, job.config)
    tensors = measured[experts[0]].tensors
    recorded = {row.tensor: Recorded(row.params, has_density=True) for row in tensors.itertuples()}
    naming = name_recorded(job.config, recorded, job.local, grouped=False, trust_remote_code=job.trust_remote_code)
    budget = _USUAL_BUDGET if job.mean_density is None else job.mean_density
    vectors = {}
    if by_saliency:
        vectors = {name: vector_file_bytes(read_vectors_of(job.folder, name, naming.names)) for name in experts}
    table = pd.concat([_densities(name, measured[name], naming, budget) for name in experts], ignore_index=True)
    return Decision(
        table=table,
        naming=naming,
        writes_weights=False,
        how=tuple(_how(job, budget)),
        after=tuple(_after(table, experts)),
        tags=("saliency_mask",) if by_saliency else (),
        merge_method=GUIDED_TIES.name if by_saliency else None,
        vectors=vectors,
    )


def _densities(model: str, measured: ExpertSaliency, naming: Naming, budget: float) -> "pd.DataFrame":
    from utils.saliency_shares import shares_of_budget

    tensors = measured.tensors.assign(density=shares_of_budget(measured.counts, measured.zeros, budget))
    wide = tensors.pivot(index="layer", columns="component", values="density")
    wide = wide[list(dict.fromkeys(tensors["component"]))]
    names = {(row.layer, row.component): naming.names[row.tensor] for row in tensors.itertuples()}
    return coefficient_table(model, wide, names, naming.params)


def _how(job: DecideJob, budget: float) -> list[tuple[str, str]]:
    usual = "; --mean_density sets another" if job.mean_density is None else ""
    lines = [
        (
            "density",
            "share of a tensor's entries whose saliency, delta^2 F, is above one threshold for all of an expert; mean "
            f"{budget}{usual}",
        )
    ]
    if job.options["mask"] == "saliency":
        lines.append(
            (
                "entries",
                "those of largest saliency, by two vectors per tensor; this recipe needs this project's utils/merger.py "
                f"and the files of vectors beside it (stock mergekit-yaml does not know {GUIDED_TIES.name})",
            )
        )
    else:
        lines.append(("entries", f"as {job.merge_method} chooses them; --mask saliency keeps the most salient instead"))
    return [*lines, ("weight", "1")]


def _after(table: "pd.DataFrame", experts: Sequence[str]) -> list[str]:
    found = []
    for name in experts:
        density = table.loc[table["model"] == name, "density"]
        none, whole = int((density == 0).sum()), int((density == 1).sum())
        if none or whole:
            found.append(f"{name}: {none} of {len(density)} tensors keep nothing, {whole} keep everything")
    return found


METHOD = GuidanceMethod(
    name="saliency_budget",
    summary="densities that spend a budget on the entries whose change matters most to the loss, delta^2 F",
    gives="densities",
    merge_method="ties",
    files=_files,
    choices=_choices,
    measure=_measure,
    decide=_decide,
    measure_flags=(
        MethodFlag(
            "gradient_at",
            "the weights at which gradients are taken: the base's, each expert's, or both, added up",
            choices=POINTS,
            default="both",
        ),
    ),
    decide_flags=(
        MethodFlag(
            "mask",
            "which entries of a tensor are kept: those of largest magnitude (a recipe for any mergekit), or of largest "
            "saliency (needs --merge_method ties and this project's utils/merger.py)",
            choices=MASKS,
            default="magnitude",
        ),
    ),
    fewest_experts=1,
    text_per_task=True,
    config_keys=("components",),
)
