"""Sens-Merging (arXiv 2502.12420): weights per layer, from what each expert's own task is sensitive to.

    S_t(l) = mean over samples of sum over parameters p of block l of | p * dL/dp |      expert t on its own text
    g(t,u) = mean over tokens x of u's text of || logits_t(x) - logits_u(x) ||_2
    weight = T * softmax over experts of ( tau_t alpha_t(l) / temperature )              `utils/guidance/sens_merging/weights.py`

The *measure* half takes S from gradients sample by sample and block by block, and g from every expert's final hidden
states on every expert's text. The *decide* half weighs the experts against each other in every block; parameters outside
the blocks, of which the formula says nothing, get the uniform weight 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.flags import number
from utils.guidance.decide_job import DecideJob, Decision
from utils.guidance.folder import csv_bytes
from utils.guidance.measure_job import MeasureJob, OnBlock, Work
from utils.guidance.method import GuidanceMethod, Measured, MethodFlag
from utils.guidance.sens_merging.tables import (
    DISTANCES,
    FILES,
    LOSSES,
    SENSITIVITY,
    TENSORS,
    Sensitivity,
    read_sensitivity,
)
from utils.guidance.sens_merging.weights import ALIGNMENTS, alignment_factors, layer_weights, normalized_sensitivities
from utils.pair.config import PairConfig
from utils.passes.subjects import Subject
from utils.recipes.coefficients import COLUMNS
from utils.recipes.naming import Recorded, name_recorded
from utils.runtime import gigabytes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from utils.pair.source import CalibrationSource

_LAMBDA = 0.4  # the same group's setting for 1.5B models; 0.7 for 7B, 0.8 for 14B


@dataclass(frozen=True)
class _Expert:
    """What one expert's passes gave: sensitivities [blocks], the samples' losses, final hidden states [tokens, hidden] of
    each text, the weights of its head."""

    sensitivities: list[float]
    losses: tuple[float, ...]
    finals: "Mapping[CalibrationSource, torch.Tensor]"
    head: "Mapping[str, torch.Tensor]"


def _choices(job: MeasureJob) -> list[str]:
    found = []
    for expert in job.experts:
        tokens, blocks = job.text(expert, expert).tokens, len(expert.decoder.blocks)
        hidden = expert.decoder.model.config.get_text_config(decoder=True).hidden_size
        found.append(tokens * blocks * hidden * expert.dtype.itemsize)
    return [
        "gradients: sample by sample, block by block; beside what is said below, the hidden states at every block's "
        f"entrance are kept, up to {gigabytes(max(found))}"
    ]


def _measure(job: MeasureJob) -> Measured:
    """Sensitivities of each expert on its own text, distances between experts on each other's."""
    import pandas as pd

    for expert in job.experts:
        _refuse_what_cannot_be_compared(job, expert)
    tensors = _tensor_rows(job.base)
    works = [
        Work(expert.entry.type, 3 * len(expert.decoder.blocks), partial(_passes, job, expert)) for expert in job.experts
    ]
    experts = dict(zip((expert.entry.type for expert in job.experts), job.run(works), strict=True))
    (compared,) = job.run([Work("distances", len(works) * (len(works) - 1), partial(_distances, job, experts))])
    distances, warnings = compared
    rows = [(name, layer, value) for name, one in experts.items() for layer, value in enumerate(one.sensitivities)]
    losses = [(name, len(one.losses), sum(one.losses) / len(one.losses)) for name, one in experts.items()]
    contents = {SENSITIVITY: rows, DISTANCES: distances, TENSORS: tensors, LOSSES: losses}
    return Measured(
        files={file: csv_bytes(pd.DataFrame(contents[file], columns=list(columns))) for file, columns in FILES.items()},
        notes=tuple(
            [
                f"{name}: loss {loss:.4f} nats per token on its own text ({count} samples)"
                for name, count, loss in losses
            ]
            + [f"{row[0]} against {row[1]}: logits {row[2]:.4g} apart on the text of {row[1]}" for row in distances]
        ),
        warnings=tuple(warnings),
    )


def _refuse_what_cannot_be_compared(job: MeasureJob, expert: Subject) -> None:
    """Refuse, before weights are read, an expert without a head or with other tokens than the rest."""
    from utils.passes.language_head import require_head

    if expert.headers is not None:
        require_head(expert.decoder, expert.headers, f"model {expert.entry.name}")
    first = job.experts[0]
    for other in job.experts:
        if job.text(expert, other).encoded != job.text(first, other).encoded:
            raise UserError(
                f"--guidance sens_merging compares the experts' logits token by token, but {expert.entry.name} and "
                f"{first.entry.name} split the text of {other.entry.type} into different tokens; use experts with the "
                "same tokenizer, or another --guidance"
            )


def _tensor_rows(base: Subject) -> list[tuple[str, int, str, int]]:
    """(name in the checkpoint, layer, component, parameters) of every parameter that is stored; -1 before the blocks, the
    number of blocks behind them (in the order in which the model declares its parts)."""
    from utils.guidance.sens_merging.sensitivities import block_layers
    from utils.models.weight_source import tied_names

    decoder = base.decoder
    layers, blocks = block_layers(decoder), len(decoder.blocks)
    components = {decoder.weight_name(layer, part): part.name for layer in range(blocks) for part in decoder.components}
    stored = base.checkpoint.tensors if base.headers is None else base.headers
    rows, absent, outside = [], [], -1
    for name, value in decoder.model.named_parameters():
        if name in layers:
            outside = blocks
        if name in stored:
            layer = layers.get(name, outside)
            rows.append((base.stored_name(name), layer, components.get(name, ""), value.numel()))
        elif name not in tied_names(decoder.model):
            absent.append(name)
    if absent:
        raise UserError(
            f"model {base.entry.name}: its checkpoint has no {', '.join(absent[:4])}, which the model has under that "
            "name: transformers renames tensors while loading, or the head is missing. A recipe could not weigh them; "
            "save the models with the names they have in memory"
        )
    return rows


def _passes(job: MeasureJob, expert: Subject, device: "torch.device", on_block: OnBlock) -> _Expert:
    """An expert's way forward and back on its own text, then forward on every text."""
    from utils.guidance.sens_merging.distances import real_tokens
    from utils.guidance.sens_merging.sensitivities import SensitivityObserver
    from utils.passes.block_gradients import observe_gradients
    from utils.passes.block_runner import run_blocks
    from utils.passes.language_head import fetch_head

    decoder, own = expert.decoder, job.text(expert, expert)
    observer = SensitivityObserver(decoder, device)
    weights = job.open_weights(expert, device)
    losses = observe_gradients(decoder, weights, own.encoded, observer, device, on_block=on_block)
    values = [value / len(own.encoded) for value in observer.sums.tolist()]
    for layer, value in enumerate(values):
        if not value < float("inf"):
            raise UserError(
                f"model {expert.entry.name}: the sensitivity of block {layer} is {value}: gradients are not finite in "
                f"{expert.dtype}; use --dtype float32 or bfloat16"
            )
    batches = [batch for text in expert.texts.values() for batch in text.batches]
    weights = job.open_weights(expert, device)
    found = iter(run_blocks(decoder, weights, batches, _Bystander(), device, on_block=on_block))
    finals = {
        source: real_tokens([next(found) for _ in text.batches], text.batches) for source, text in expert.texts.items()
    }
    head = fetch_head(decoder, job.open_weights(expert, device))
    return _Expert(values, losses, finals, {name: tensor.cpu() for name, tensor in head.items()})


class _Bystander:
    """A visitor of blocks that only lets the tokens through."""

    rewrites = False

    def observing(self, layer: int, block: Any) -> Any:
        """Observe nothing."""
        import contextlib

        return contextlib.nullcontext()

    def begin(self, batch: Any) -> None:
        """Nothing to note."""

    def finish(self, layer: int, block: Any) -> None:
        """Nothing to take."""


def _distances(
    job: MeasureJob, found: Mapping[str, _Expert], device: "torch.device", on_block: OnBlock
) -> tuple[list[tuple[str, str, float, int]], list[str]]:
    """Rows (model, other, distance on the other's text, tokens), and warnings; two heads are in memory at a time."""
    from utils.guidance.sens_merging.distances import mean_distance, tokens_at_once
    from utils.passes.language_head import language_head

    rows, warnings = [], []
    for expert in job.experts:
        for other in job.experts:
            if other is expert:
                continue
            ours, theirs = found[expert.entry.type], found[other.entry.type]
            text = job.config.text_of(other.entry.type)
            sizes = [one.decoder.model.get_input_embeddings().weight.shape[0] for one in (expert, other)]
            with (
                language_head(expert.decoder, ours.head, device) as our_logits,
                language_head(other.decoder, theirs.head, device) as their_logits,
            ):
                finals, at_once = (ours.finals[text], theirs.finals[text]), tokens_at_once(max(sizes))
                mean, sizes = mean_distance(*finals, our_logits, their_logits, device, at_once)
            distance = float(mean)
            names = f"{expert.entry.name} and {other.entry.name}"
            if not distance < float("inf"):
                raise UserError(f"the distance between the logits of {names} is {distance}; use --dtype float32")
            if sizes[0] != sizes[1]:
                warnings.append(f"{names} have {sizes[0]} and {sizes[1]} logits; the first {min(sizes)} were compared")
            rows.append((expert.entry.type, other.entry.type, distance, len(finals[0])))
            on_block(len(rows))
    return rows, warnings


def _decide(job: DecideJob) -> Decision:
    """Weights per layer from sensitivities and distances."""
    measured = read_sensitivity(job.folder, [entry.type for entry in job.experts], job.config)
    temperature, alignment = job.options["temperature"], job.options["alignment"]
    factors = alignment_factors(measured.distances, alignment)
    weights = layer_weights(normalized_sensitivities(measured.sensitivities), factors, temperature)
    recorded = {
        row.tensor: Recorded(int(row.params), bool(row.component), _group(row.layer, measured))
        for row in measured.tensors.itertuples()
    }
    naming = name_recorded(job.config, recorded, job.local, grouped=True, trust_remote_code=job.trust_remote_code)
    return Decision(
        table=_table(job, measured, weights, naming.names),
        naming=naming,
        writes_weights=True,
        how=tuple(_how(job, factors)),
        after=(_spread(weights),),
        tags=tuple(_tags(job)),
        lambda_=_LAMBDA,
    )


def _group(layer: int, measured: Sensitivity) -> int | None:
    """What shares one weight: the tensors of a block, and all that lie outside."""
    return layer if 0 <= layer < measured.blocks else None


def _table(job: DecideJob, measured: Sensitivity, weights: "np.ndarray", names: Mapping[str, str]) -> "pd.DataFrame":
    import pandas as pd

    kept = 1.0 if job.mean_density is None else job.mean_density
    parts = []
    for entry, own in zip(job.experts, weights, strict=True):
        part = measured.tensors.assign(model=entry.type, tensor=[names[name] for name in measured.tensors["tensor"]])
        part["weight"] = [
            1.0 if _group(layer, measured) is None else float(own[layer]) for layer in part["layer"].tolist()
        ]
        part["density"] = [kept if component else 1.0 for component in part["component"]]
        parts.append(part[list(COLUMNS)])
    return pd.concat(parts, ignore_index=True)


def _how(job: DecideJob, factors: Sequence[float]) -> list[tuple[str, str]]:
    listed = ", ".join(f"{entry.type} {factor:.4f}" for entry, factor in zip(job.experts, factors, strict=True))
    favored = {
        "distance": "the expert whose logits differ most from the others' gets the most",
        "similarity": "the expert whose logits agree most with the others' gets the most",
    }
    return [
        (
            "weight",
            f"experts x softmax over experts of tau x alpha / {job.options['temperature']}, per block; what lies outside "
            "the blocks gets the uniform weight 1",
        ),
        ("tau", f"{listed} (alignment {job.options['alignment']}: {favored[job.options['alignment']]})"),
    ]


def _spread(weights: "np.ndarray") -> str:
    low, high = float(weights.min()), float(weights.max())
    return f"\nspread: the blocks' weights are {low:.4f} to {high:.4f}, {low - 1:+.1%} to {high - 1:+.1%} around uniform (1)"


def _tags(job: DecideJob) -> list[str]:
    given = {
        flag.name: job.options[flag.name] for flag in METHOD.decide_flags if job.options[flag.name] != flag.default
    }
    temperature = given.pop("temperature", None)
    return [*([] if temperature is None else [f"temperature{temperature}"]), *given.values()]


def _files(config: PairConfig) -> tuple[str, ...]:
    return tuple(FILES)


METHOD = GuidanceMethod(
    name="sens_merging",
    summary="weights per layer from gradient sensitivity and logit distances (arXiv 2502.12420)",
    gives="weights",
    merge_method="task_arithmetic",
    files=_files,
    choices=_choices,
    measure=_measure,
    decide=_decide,
    decide_flags=(
        MethodFlag(
            "temperature",
            "of the softmax over experts; the larger, the closer the weights are to uniform",
            type=number(0, low_open=True),
            default=1.0,
        ),
        MethodFlag(
            "alignment",
            "which expert is favored: distance, the one whose logits differ most (as published); similarity, the one "
            "whose logits agree most with the others'",
            choices=ALIGNMENTS,
            default="distance",
        ),
    ),
    fewest_experts=2,
    text_per_task=True,
    config_keys=("components",),
)
