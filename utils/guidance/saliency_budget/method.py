"""Our own: what may be kept of a fine-tune goes where its entries matter most to the loss.

    F_ij     = sum over samples of (dL/dW_ij)^2         on the expert's own text, at base, expert, or both added up
    saliency = delta_ij^2 F_ij^p                        delta = expert - base
    density(tensor) = share of its entries above a threshold, one for all measured tensors of an expert, so that the
                      mean density is the budget

With p = 1, saliency is, up to a factor, the second-order estimate of what the loss loses with an entry of the change
(optimal brain damage, with squared gradients for the curvature); p = 0.5 keeps more of the skill (the default, measured
by benchmarks/quality.py). The *measure* half stores histograms of it per tensor, so that any budget can be solved later,
and F of every parameter as one vector per axis; the *decide* half solves the budget. Inside a tensor the plain recipe
keeps the entries of largest magnitude, as every `ties` does; with `--mask saliency` the recipe names the vectors and
this project's merge method `guided_ties`, which keeps those of largest saliency.

The vectors also serve `--merge_method guided_mean`, which needs no budget: each entry of the merged change is the mean
of the experts', weighed by F^0.5 of each (Fisher-weighted averaging, arXiv 2111.09832).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.flags import number
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.folder import csv_bytes
from utils.guidance.measure_job import MeasureJob, OnBlock, Work
from utils.guidance.method import GuidanceMethod, Measured, MethodFlag
from utils.guidance.saliency_budget.tables import (
    COLUMNS,
    HISTOGRAM,
    TENSORS,
    ExpertSaliency,
    read_power,
    read_saliency,
    read_vector_file,
    read_vectors_of,
    vector_file,
)
from utils.pair.config import PairConfig
from utils.passes.subjects import Subject
from utils.recipes.coefficients import coefficient_table
from utils.recipes.method_rules import GUIDED_MEAN, GUIDED_TIES, DeltaMethod
from utils.recipes.naming import Naming, Recorded, name_recorded
from utils.recipes.saliency_vectors import vector_file_bytes
from utils.runtime import gigabytes

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from utils.guidance.saliency_budget.expert_saliency import ExpertMeasurement

POINTS = {"base": (True, False), "expert": (False, True), "both": (True, True)}  # gradients at base and expert
MASKS = ("magnitude", "saliency")
_USUAL_BUDGET = 0.4  # in the middle of what LEWIS's densities of 0.3 to 0.8 come to on average, 0.34 to 0.47
_SILENT = 0.1  # share of the changed entries without any gradient from which on something is wrong


def _files(config: PairConfig) -> tuple[str, ...]:
    return (TENSORS, HISTOGRAM, *(vector_file(entry.type) for entry in config.experts))


def _at(job: MeasureJob, expert: Subject) -> tuple[Subject, ...]:
    """The models whose gradients are taken."""
    wanted = POINTS[job.options["gradient_at"]]
    return tuple(subject for subject, is_wanted in zip((job.base, expert), wanted, strict=True) if is_wanted)


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
        blocks = f"{expert.decoder.blocks_path}."
        named = expert.decoder.model.named_parameters()
        outside = [value.numel() for name, value in named if not name.startswith(blocks)]
        found.append(sum(sizes) + max(4 * sum(weights), expert.dtype.itemsize * sum(outside)))
    point = {"base": "at the base", "expert": "at each expert", "both": "at the base and at each expert, added up"}
    return [
        f"components: {', '.join(part.name for part in parts)} "
        f"({'as configured' if job.config.components else 'every linear part of a block'}); vectors of every parameter",
        f"gradients: {point[job.options['gradient_at']]}, sample by sample, block by block; beside what is said below, up "
        f"to {gigabytes(max(found))} for hidden states at every block's entrance, and one block's squared gradients or "
        "the embeddings' gradients",
    ]


def _measure(job: MeasureJob) -> Measured:
    """Saliencies of every expert on its own text."""
    import pandas as pd

    from utils.passes.language_head import require_head

    at, works = POINTS[job.options["gradient_at"]], []
    for expert in job.experts:
        for subject in _at(job, expert):
            if subject.headers is not None:
                require_head(subject.decoder, subject.headers, f"model {subject.entry.name}")
        # A skeleton of its own for each work: works may run side by side, and weights are placed into it.
        pair = tuple(_own_skeleton(subject) for subject in (job.base, expert))
        blocks = 2 * len(_at(job, expert)) * len(expert.decoder.blocks)
        works.append(Work(expert.entry.type, blocks, partial(_saliencies, job, *pair, at)))
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
        warnings += [*_doubts(expert, own), *_unskilled(expert, *measured[name].losses)]
    return Measured(files, tuple(notes), tuple(warnings))


def _own_skeleton(subject: Subject) -> Subject:
    return replace(subject, decoder=copy.deepcopy(subject.decoder))


def _saliencies(
    job: MeasureJob, base: Subject, expert: Subject, at: tuple[bool, bool], device: "torch.device", on_block: OnBlock
) -> "ExpertMeasurement":
    from utils.guidance.saliency_budget.expert_saliency import measure_saliency

    return measure_saliency(job, base, expert, at, device, on_block)


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


def _unskilled(expert: Subject, at_base: Sequence[float], at_expert: Sequence[float]) -> list[str]:
    """A doubt where both were taken and the expert is no better on its own text than the base."""
    before, after = (sum(losses) / max(1, len(losses)) for losses in (at_base, at_expert))
    if not at_base or not at_expert or after < before:
        return []
    return [
        f"{expert.entry.name} is no better on its own text than the base (loss {after:.4f}, base {before:.4f}), so its "
        "gradients say little of its skill; is it the text of its task (calibration in the pair config)?"
    ]


def _decide(job: DecideJob) -> Decision:
    """Densities that spend the budget on the largest saliencies, and the vectors that the merge method reads."""
    import pandas as pd

    method = _own_merge_method(job)
    experts = [entry.type for entry in job.experts]
    measured = read_saliency(job.folder, experts, job.config)
    power = read_power(job.manifest)
    tensors = measured[experts[0]].tensors
    recorded = {row.tensor: Recorded(row.params, has_density=True) for row in tensors.itertuples()}
    naming = name_recorded(job.config, recorded, job.local, grouped=False, trust_remote_code=job.trust_remote_code)
    usual = 1.0 if method is GUIDED_MEAN else _USUAL_BUDGET
    budget = usual if job.mean_density is None else job.mean_density
    vectors = {}
    if method is GUIDED_TIES:
        raised = {name: read_vectors_of(job.folder, name, naming.names, power) for name in experts}
        vectors = {name: vector_file_bytes(axes) for name, axes in raised.items()}
    elif method is GUIDED_MEAN:
        vectors = {name: read_vector_file(job.folder, name, list(naming.names)) for name in experts}
    table = pd.concat([_densities(name, measured[name], naming, budget) for name in experts], ignore_index=True)
    given = job.config.global_parameters
    numbers = {one.name: one.default for one in GUIDED_MEAN.numbers if one.name != "lambda" and one.name not in given}
    return Decision(
        table=table,
        naming=naming,
        writes_weights=False,
        how=tuple(_how(job, method, budget, power)),
        after=tuple(_after(table, experts) if method is not GUIDED_MEAN or job.mean_density else ()),
        tags=("saliency_mask",) if method is GUIDED_TIES else (),
        merge_method=method.name if method else None,
        parameters=numbers if method is GUIDED_MEAN else {},
        vectors=vectors,
    )


def _own_merge_method(job: DecideJob) -> DeltaMethod | None:
    """This project's merge method that the recipe will name, None for mergekit's."""
    by_saliency = job.options["mask"] == "saliency"
    if by_saliency and job.merge_method == GUIDED_MEAN.name:
        raise UserError(
            f"--mask saliency does nothing for --merge_method {GUIDED_MEAN.name}, which keeps the entries of largest "
            "saliency wherever --mean_density is given; leave it out"
        )
    if by_saliency and job.merge_method != "ties":
        raise UserError(
            f"--mask saliency cannot be used with --merge_method {job.merge_method}: only {GUIDED_TIES.name}, this "
            "project's ties, selects entries by saliency; give --merge_method ties, or leave out --mask"
        )
    return GUIDED_TIES if by_saliency else GUIDED_MEAN if job.merge_method == GUIDED_MEAN.name else None


def _densities(model: str, measured: ExpertSaliency, naming: Naming, budget: float) -> "pd.DataFrame":
    from utils.guidance.saliency_budget.shares import shares_of_budget

    tensors = measured.tensors.assign(density=shares_of_budget(measured.counts, measured.zeros, budget))
    wide = tensors.pivot(index="layer", columns="component", values="density")
    wide = wide[list(dict.fromkeys(tensors["component"]))]
    names = {(row.layer, row.component): naming.names[row.tensor] for row in tensors.itertuples()}
    return coefficient_table(model, wide, names, naming.params)


def _how(job: DecideJob, method: DeltaMethod | None, budget: float, power: float) -> list[tuple[str, str]]:
    usual = "; --mean_density sets another" if job.mean_density is None else ""
    saliency = "delta^2 F" if power == 1 else f"delta^2 F^{power:g}"
    density = (
        "density",
        f"share of a tensor's entries whose saliency, {saliency}, is above one threshold for all of an expert; mean "
        f"{budget}{usual}",
    )
    needs = (
        "this recipe needs this project's utils/merger.py and the files of vectors beside it (stock mergekit-yaml does "
        f"not know {method.name if method else ''})"
    )
    if method is GUIDED_MEAN:
        whole = ("density", "1, whole deltas; --mean_density shares out less by saliency")
        return [
            whole if job.mean_density is None else density,
            ("entries", f"each expert counts by F^power of its own text, F by one vector per axis; {needs}"),
            ("weight", "1 for each expert; only ratios of weights matter"),
        ]
    if method is GUIDED_TIES:
        entries = f"those of largest saliency, by one vector per axis; {needs}"
    else:
        entries = f"as {job.merge_method} chooses them; --mask saliency keeps the most salient instead"
    return [density, ("entries", entries), ("weight", "1")]


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
    own_merge_methods=(GUIDED_MEAN.name,),
    files=_files,
    choices=_choices,
    measure=_measure,
    decide=_decide,
    measure_flags=(
        MethodFlag(
            "gradient_at",
            "the weights at which gradients are taken: the base's, each expert's, or both, added up",
            choices=tuple(POINTS),
            default="both",
        ),
        MethodFlag(
            "saliency_power",
            "exponent p of the squared gradients in the saliency delta^2 F^p, above 0, at most 1",
            type=number(0, 1, low_open=True),
            default=0.5,
        ),
    ),
    decide_flags=(
        MethodFlag(
            "mask",
            "which entries of a tensor are kept: those of largest magnitude (a recipe for any mergekit), or of largest "
            "saliency (needs --merge_method ties and this project's utils/merger.py; guided_mean does so anyway)",
            choices=MASKS,
            default="magnitude",
        ),
    ),
    fewest_experts=1,
    text_per_task=True,
    config_keys=("components",),
)
