"""LEWIS (arXiv 2503.03874): how much a fine-tune changed each layer's activation-weighted norm decides its density.

    I(l,c)  = || |W| o sqrt(s) ||_F                         norm of the Wanda metric, s_j the second moment of input j
    D(l,c)  = | I_expert(l,c) - I_base(l,c) |
    d(l,c)  = D(l,c) / sum over layers of D(.,c)            the delta table: layer x component
    density = gamma + (epsilon - gamma) * (d - min d) / (max d - min d)      over the whole table of one expert

The *measure* half (`LewisVisitor`, `delta_table`) turns a model's blocks into norms and norms into delta tables, the
*decide* half (`densities`) turns delta tables into densities.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.flags import number
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.lewis.naming import name_tensors
from utils.guidance.lewis.tables import NORMS, TEXT, Measurements, delta_file, read_measurements, table_files
from utils.guidance.measure_job import MeasureJob, OnBlock, Work
from utils.guidance.method import GuidanceMethod, Measured, MethodFlag
from utils.pair.config import PairConfig
from utils.passes.subjects import EncodedText, Subject
from utils.recipes.coefficients import coefficient_table, with_mean_density

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from utils.models.decoder import Decoder
    from utils.pair.batches import MicroBatch

BOUNDS = ("minmax", "clip")
_DECIMALS = 5  # the released code rounds the deltas before it scales them


class LewisVisitor:
    """Measures the LEWIS norm of every component of every block (a `block_runner.Visitor`).

    `norms` maps (layer, component name) to a float64 scalar tensor on the device, || |W| * sqrt(s) ||_F with s_j the
    sum over real tokens of x_j^2 divided by `divisor`.

    Args:
        decoder: the model.
        tokens: real tokens in all micro-batches; each component must see every one of them once.
        divisor: what the sums of squares are divided by: the token count (ours) or the sample count (the reference).
        sparsity_ratio: share of each row of each linear part that is zeroed by the Wanda metric once a block's norms
            are taken; the pruned block's output feeds the next block.
    """

    def __init__(self, decoder: "Decoder", tokens: int, divisor: int, sparsity_ratio: float) -> None:
        from utils.guidance.lewis.second_moments import SecondMoments

        self.decoder, self.tokens, self.divisor, self.sparsity_ratio = decoder, tokens, divisor, sparsity_ratio
        paths = [component.path for component in decoder.components]
        self.moments = SecondMoments(decoder.linear_paths if self.rewrites else paths)
        self.norms: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def rewrites(self) -> bool:
        """Pruning replaces weights."""
        return self.sparsity_ratio > 0

    def observing(self, layer: int, block: "nn.Module") -> contextlib.AbstractContextManager[None]:
        """Observe the inputs of the block's linear parts."""
        return self.moments.attached(block)

    def begin(self, batch: "MicroBatch") -> None:
        """Take note of which tokens are real."""
        self.moments.begin(batch)

    def finish(self, layer: int, block: "nn.Module") -> None:
        """Take the block's norms, then prune it if asked."""
        from torch import nn

        from utils.guidance.lewis.norms import metric_norm, pruned
        from utils.models.decoder import is_transposed, weight_matrix

        moments = {path: sums / self.divisor for path, sums in self.moments.checked(layer, self.tokens).items()}
        for component in self.decoder.components:
            weight = weight_matrix(block.get_submodule(component.path))
            self.norms[layer, component.name] = metric_norm(weight, moments[component.path])
        if not self.rewrites:
            return
        for path, moment in moments.items():
            module = block.get_submodule(path)
            new = pruned(weight_matrix(module), moment, self.sparsity_ratio)
            module.weight = nn.Parameter(new.t() if is_transposed(module) else new, requires_grad=False)


def delta_table(norms: "pd.DataFrame", expert: str, base: str, components: Sequence[str]) -> "pd.DataFrame":
    """Normalized norm differences of one expert: `|I_expert - I_base|`, each component's column divided by its sum.

    A component that the fine-tune did not change at all gets zeros (the formula's 0/0).

    Args:
        norms: tidy norms with at least the columns `model, layer, component, norm`, one row per measured tensor.
        expert: the expert's value in the column `model`.
        base: the base's value there.
        components: the columns of the result, in this order.

    Returns:
        float64, one row per layer (ascending, index 0, 1, ...), one column per component, values in [0, 1].

    Raises:
        ValueError: the two models were not measured on the same layers and components, or a norm is not finite.
    """
    tables = []
    for model in (expert, base):
        own = norms[norms["model"] == model]
        tables.append(own.pivot(index="layer", columns="component", values="norm").astype("float64"))
    ours, theirs = tables
    wanted = list(components)
    absent = [name for name in wanted if name not in ours.columns or name not in theirs.columns]
    if absent or not ours.index.equals(theirs.index):
        raise ValueError(f"{expert} and {base} were not measured on the same layers and components ({absent})")
    change = (ours[wanted] - theirs[wanted]).abs()
    if not (change < float("inf")).all(axis=None):  # false for NaN too
        raise ValueError(f"the norms of {expert} or {base} are incomplete or not finite")
    total = change.sum(axis=0)
    table = change.div(total.where(total > 0, 1.0), axis=1).reset_index(drop=True)
    table.columns = wanted
    return table


def densities(deltas: "pd.DataFrame", gamma: float, epsilon: float, bound: str = "minmax") -> "pd.DataFrame":
    """Densities of one expert from its delta table.

    `minmax` is the released code's map: the smallest delta of the table gets `gamma`, the largest `epsilon`. `clip` is
    the paper's wording: the deltas, relative to the largest, are clipped to [gamma, epsilon]. Deltas are rounded to
    five decimals first. Where all are equal nothing is known to matter more, and all get `(gamma + epsilon) / 2`.

    Args:
        deltas: layer x component, finite and not negative.
        gamma: density of what changed least, 0 to 1.
        epsilon: density of what changed most, gamma to 1.
        bound: `minmax` or `clip`.

    Returns:
        float64 in the same layout, within [gamma, epsilon] up to one rounding of float64 (the operations are in the
        released code's order, so that its numbers come out bit for bit).
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound {bound!r} is not one of {BOUNDS}")
    # Python's round is exact in decimal; numpy's, which multiplies, differs in the last place.
    rounded = deltas.map(lambda value: round(float(value), _DECIMALS))
    low, high = float(rounded.min(axis=None)), float(rounded.max(axis=None))
    if low == high:
        return rounded * 0.0 + (gamma + epsilon) / 2
    if bound == "clip":
        return (rounded / high).clip(gamma, epsilon)
    return gamma + (rounded - low) / (high - low) * (epsilon - gamma)


def share_at_bounds(density: "pd.DataFrame", gamma: float, epsilon: float) -> tuple[float, float]:
    """The shares of a density table's entries that are exactly `gamma`, and exactly `epsilon`."""
    return float((density == gamma).to_numpy().mean()), float((density == epsilon).to_numpy().mean())


def _files(config: PairConfig) -> tuple[str, ...]:
    return (*(delta_file(entry.type) for entry in config.experts), NORMS)


def _choices(job: MeasureJob) -> list[str]:
    config = job.config
    names = ", ".join(part.name for part in job.base.decoder.components)
    lines = [f"components: {names} ({'as configured' if config.components else 'every linear part of a block'})"]
    if config.parity:
        lines.append("parity: reference (samples padded with EOS, pads attended and counted, means over samples)")
    if config.sparsity_ratio:
        lines.append(f"pruning while measuring: {config.sparsity_ratio:g} of each row, by the Wanda metric")
    return lines


def _measure(job: MeasureJob) -> Measured:
    """Norms of the base on every text and of each expert on its own."""
    import pandas as pd

    config = job.config
    works, labels = [], {}
    for source in config.texts:
        users = [entry.type for entry in config.experts if config.text_of(entry.type) == source]
        labels |= dict.fromkeys(users, users[0])
        for subject in job.subjects:
            if subject.entry.type in (config.base_model_type, *users):
                # A skeleton of its own: the base is measured on several texts, perhaps on several devices at once.
                own = replace(subject, decoder=copy.deepcopy(subject.decoder)) if len(config.texts) > 1 else subject
                do = partial(_norms, job, own, subject.texts[source], users[0])
                works.append(Work(subject.entry.type, len(subject.decoder.blocks), do))
    norms = pd.DataFrame([row for rows in job.run(works) for row in rows])
    components = list(dict.fromkeys(norms["component"]))
    deltas, warnings = {}, []
    for entry in config.experts:
        own = norms[norms[TEXT] == labels[entry.type]]
        deltas[entry.type] = delta_table(own, entry.type, config.base_model_type, components)
        if not deltas[entry.type].to_numpy().any():
            warnings.append(f"{entry.name} has exactly the base's norms everywhere; is it the same model?")
    if len(config.texts) == 1:
        norms = norms.drop(columns=TEXT)
    return Measured(table_files(deltas, norms, config.base_model_type), warnings=tuple(warnings))


def _norms(
    job: MeasureJob, subject: Subject, text: EncodedText, label: str, device: "torch.device", on_block: OnBlock
) -> list[dict[str, Any]]:
    from utils.passes.block_runner import run_blocks

    divisor = len(text.encoded) if job.config.parity else text.tokens
    visitor = LewisVisitor(subject.decoder, text.tokens, divisor, job.config.sparsity_ratio)
    weights = job.open_weights(subject, device)
    run_blocks(subject.decoder, weights, text.batches, visitor, device, on_block=on_block)
    rows = []
    for (layer, name), norm in visitor.norms.items():
        component = next(part for part in subject.decoder.components if part.name == name)
        weight = subject.decoder.weight_name(layer, component)
        value = float(norm)
        if not value < float("inf"):
            raise UserError(
                f"model {subject.entry.name}: the norm of {weight} is {value}: its weights or its inputs are not "
                f"finite in {subject.dtype}; check the checkpoint, or use --dtype float32 or bfloat16"
            )
        rows.append(
            {
                "model": subject.entry.type,
                "layer": layer,
                "component": name,
                "tensor": subject.stored_name(weight),
                "norm": value,
                "params": subject.decoder.blocks[layer].get_submodule(component.path).weight.numel(),
                TEXT: label,
            }
        )
    return rows


def _decide(job: DecideJob) -> Decision:
    """Densities from the delta tables, scaled to a mean if one is asked for."""
    import pandas as pd

    gamma, epsilon = job.options["gamma"] + 0.0, job.options["epsilon"]  # -0 is 0, in the file name too
    bound = job.options["bound"]
    as_weights = bool(job.options["apply_lewis_to_weights"])
    if gamma > epsilon:
        raise UserError(
            f"--gamma {gamma} is above --epsilon {epsilon}: gamma is the density of what changed "
            "least, epsilon of what changed most; swap them"
        )
    measured = _read(job)
    naming = name_tensors(job.config, measured, job.local, trust_remote_code=job.trust_remote_code)
    columns = list(measured.deltas[job.experts[0].type].columns)
    parts = []
    for entry in job.experts:
        density = densities(measured.deltas[entry.type][columns], gamma, epsilon, bound)
        parts.append(coefficient_table(entry.type, density, naming.names, naming.params, as_weights=as_weights))
    table = pd.concat(parts, ignore_index=True)
    if job.mean_density is not None:
        table = with_mean_density(table, job.mean_density, as_weights=as_weights)
    clip = ("clip",) if bound == "clip" else ()
    return Decision(
        table=table,
        naming=naming,
        writes_weights=as_weights,
        how=tuple(_how(job)),
        after=tuple(_at_bounds(table, job)) if clip and job.mean_density is None else (),
        warnings=measured.warnings,
        numbers=(gamma, epsilon),
        tags=clip,
        scale=(gamma, epsilon) if job.mean_density is None else None,
    )


def _read(job: DecideJob) -> Measurements:
    config, folder = job.config, job.folder
    merged = [entry.type for entry in job.experts]
    # A table of an expert that the config measures but does not merge may lie there; it is checked and left out.
    spare = [
        entry.type
        for entry in config.experts
        if entry.type not in merged and (folder / delta_file(entry.type)).exists()
    ]
    measured = read_measurements(folder, [*merged, *spare], config.base_model_type, config.components)
    first = measured.deltas[merged[0]]
    for model_type in merged[1:]:
        if set(measured.deltas[model_type].columns) != set(first.columns):
            raise UserError(
                f"dataframe folder {folder}: {delta_file(merged[0])} and {delta_file(model_type)} hold different "
                "components; measure both experts with the same config"
            )
    return measured


def _how(job: DecideJob) -> list[tuple[str, str]]:
    gamma, epsilon = job.options["gamma"], job.options["epsilon"]
    if job.options["bound"] == "clip":
        text = f"clip: delta / largest delta of the expert, clipped to [{gamma}, {epsilon}]"
    else:
        text = f"minmax: {gamma} for the smallest delta of the expert to {epsilon} for the largest"
    lines = [("density", text)]
    if job.mean_density is not None:
        lines.append(
            (
                "",
                f"then min(1, c x density) with a mean of {job.mean_density} per expert; gamma and epsilon shape the "
                "densities but no longer bind them",
            )
        )
    lines.append(("weight", "the same numbers" if job.options["apply_lewis_to_weights"] else "1"))
    return lines


def _at_bounds(table: "pd.DataFrame", job: DecideJob) -> list[str]:
    gamma, epsilon = job.options["gamma"], job.options["epsilon"]
    lines = []
    for entry in job.experts:
        low, high = share_at_bounds(table[table["model"] == entry.type][["density"]], gamma, epsilon)
        lines.append(f"{entry.type}: at the bounds {low:.0%} of the tensors at {gamma}, {high:.0%} at {epsilon}")
    return lines


METHOD = GuidanceMethod(
    name="lewis",
    summary="densities from the change of each layer's activation-weighted norm (arXiv 2503.03874)",
    gives="densities",
    merge_method="ties",
    files=_files,
    choices=_choices,
    measure=_measure,
    decide=_decide,
    decide_flags=(
        MethodFlag("gamma", "density of what changed least, 0 to 1", type=number(0, 1), default=0.3),
        MethodFlag(
            "epsilon", "density of what changed most, gamma to 1", type=number(0, 1, low_open=True), default=0.8
        ),
        MethodFlag("apply_lewis_to_weights", "use the densities as merging weights too", switch=True, default=False),
        MethodFlag(
            "bound",
            "how deltas become densities; minmax: scaled from gamma to epsilon; clip: relative to the largest, clipped",
            choices=BOUNDS,
            default="minmax",
        ),
    ),
    config_keys=("sparsity_ratio", "parity", "components"),
)
