"""Submodule linearity, measure half: Gram matrices and scores of every part, in one pass of the base through all texts."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from utils.errors import UserError
from utils.guidance.measure_job import Measured, MeasureJob
from utils.guidance.own_text import accepted_doubts, both_forward, gains_on_own_text
from utils.guidance.submodule_linearity.called_parts import walk_through_parts
from utils.guidance.submodule_linearity.comparison import Compared, ComparedText, compare_models
from utils.guidance.submodule_linearity.gram import require_token_axis
from utils.guidance.submodule_linearity.method import NAME, TENSOR, WHOLE
from utils.guidance.submodule_linearity.outside_changes import ComparedModel
from utils.guidance.submodule_linearity.part_changes import PartChanges
from utils.guidance.submodule_linearity.parts import outside_submodules, own_parameters, require_comparable
from utils.guidance.submodule_linearity.tables import (
    FOLD_TABLE,
    GRAM_TABLE,
    MISSED_TABLE,
    SCORE_TABLE,
    TENSOR_TABLE,
)
from utils.guidance.submodule_linearity.whole_models import WAYS
from utils.models.weight_source import tied_names
from utils.passes.language_head import require_head
from utils.passes.snapshots import Snapshots
from utils.passes.subjects import Subject, component_names, largest_block, memory_estimate
from utils.workers.piece import Piece, Place


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    lines = [
        "inputs: the base's own; parts: blocks, their children, every module with parameters; all in float32, because "
        "bfloat16 would round away what a fine-tune changes",
    ]
    if job.options["nonlinearity"]:
        lines.append(
            "non-linearity: of parts and whole models, by weights in between; blocks merged at every level, tried on "
            "half of the samples. That more than doubles the work (--no-nonlinearity leaves it out) and keeps the hidden "
            "states of each expert's own text six times"
        )
    if len(job.devices) > 1:
        lines.append(f"of the devices only {job.devices[0]} is used: the models go through one block together")
    return lines


def memory(job: MeasureJob) -> int:
    """Bytes on one device at its peak, about: two blocks and what lies outside of all models, beside the base's own pass."""
    model, blocks = job.base.decoder.model, job.base.decoder.blocks
    outside = sum(value.numel() for value in model.parameters()) - sum(value.numel() for value in blocks.parameters())
    base = replace(job.base, dtype=torch.float32)
    return memory_estimate(base) + sum(4 * (2 * largest_block(expert) + outside) for expert in job.experts)


def on_disk(job: MeasureJob) -> int:
    """Bytes of the snapshots that a run after a kill goes on from: the hidden states of all passes in float32, and those
    before while they are written."""
    hidden = job.base.decoder.model.config.get_text_config(decoder=True).hidden_size
    slots = {source: sum(batch.input_ids.numel() for batch in text.batches) for source, text in job.base.texts.items()}
    passed = sum(slots.values())
    if job.options["nonlinearity"]:
        passed += WAYS * sum(slots[job.config.text_of(expert.entry.type)] for expert in job.experts)
    return 2 * torch.float32.itemsize * hidden * passed


def measure(job: MeasureJob) -> Measured:
    """Gram matrices, tensors and scores of every part, in one pass of the base through all texts."""
    require_comparable(job.base.decoder, {f"model {one.entry.name}": one.decoder for one in job.experts})
    _require_parts(job.base)
    compared = [job.base, *job.experts]
    for subject in compared:
        require_head(subject.decoder, subject.layout, f"model {subject.entry.name}")
    on_text = gains_on_own_text(job, job.experts, both_forward)
    own = job.of(*compared)
    piece = Piece(NAME, _compared, (own,), len(job.base.decoder.blocks), NAME, types=(Compared, PartChanges))
    (found,) = job.run([piece])
    _refuse_not_finite(job, found)
    types = [expert.entry.type for expert in job.experts]
    text_of = {one: list(job.config.texts).index(job.config.text_of(one)) for one in types}
    rows = {
        GRAM_TABLE: _gram_rows(found, types, text_of),
        TENSOR_TABLE: _tensor_rows(compared[0], found.parts),
        SCORE_TABLE: _score_rows(found, types),
        FOLD_TABLE: _fold_rows(found, types, text_of),
        MISSED_TABLE: [(layer, level, types[one], value) for (layer, level, one), value in found.missed.items()],
    }
    files = {form.file: form.content(own) for form, own in rows.items()}
    doubts = accepted_doubts(on_text.gains)
    return Measured(files, warnings=(*doubts, *_warnings(job, found)), routing=on_text.routing)


def _require_parts(base: Subject) -> None:
    """Refuse, before weights are read, a part of blocks that is not called once, and one outside whose output has no axis of
    tokens."""
    model, text = base.decoder.model, next(iter(base.texts.values()))
    seen = walk_through_parts(base.decoder, text.encoded[0], f"model {base.entry.name}")
    for path in outside_submodules(base.decoder).paths:
        module = model.get_submodule(path)
        if path in seen.outputs and len(own_parameters(module)) == sum(1 for _ in module.parameters()):
            require_token_axis(seen.outputs[path], seen.samples, seen.tokens, f"model {base.entry.name}: {path}")


def _compared(place: Place, job: MeasureJob) -> Compared:
    types = [expert.entry.type for expert in job.experts]
    texts = [
        ComparedText(
            job.base.texts[source].batches,
            tuple(place for place, one in enumerate(types) if job.config.text_of(one) == source),
        )
        for source in job.config.texts
    ]
    apart = any(job.open_weights(subject, place.device).experts_apart for subject in job.subjects)  # all alike
    base, *experts = (_opened(job, replace(one, experts_apart=apart), place.device) for one in job.subjects)
    scores = bool(job.options["nonlinearity"])
    kept = Snapshots(place.snapshot)
    return compare_models(base, experts, texts, place.device, scores=scores, on_block=place.on_step, snapshots=kept)


def _opened(job: MeasureJob, subject: Subject, device: torch.device) -> ComparedModel:
    weights = job.open_weights(replace(subject, dtype=torch.float32), device)
    stored = job.open_weights(subject, device)
    return ComparedModel(subject.decoder, weights, stored, f"model {subject.entry.name}")


def _refuse_not_finite(job: MeasureJob, found: Compared) -> None:
    for part in found.parts:
        if not bool(part.sums.isfinite().all()):
            raise UserError(
                f"what the experts change about {part.name} of layer {part.layer} is not finite: the weights of a model "
                f"or the hidden states of {job.base.entry.name} are not; check the checkpoints",
                "measured-not-finite",
            )


def _warnings(job: MeasureJob, compared: Compared) -> list[str]:
    found = []
    for place, expert in enumerate(job.experts):
        if not any(float(part.sums[..., place, place].sum()) > 0 for part in compared.parts):
            found.append(f"{expert.entry.name} changes nothing on this text; is it the base?")
    rows = {one.decoder.model.get_output_embeddings().weight.shape[0] for one in (job.base, *job.experts)}
    if len(rows) > 1:
        found.append(
            f"vocabularies have {min(rows)} to {max(rows)} rows; the head is weighed by the first {min(rows)}, which all have"
        )
    return found


def _gram_rows(found: Compared, types: Sequence[str], text_of: Mapping[str, int]) -> list[tuple]:
    """The Gram matrices; experts that share a text have equal rows for it.

    Args:
        found: what was measured.
        types: the experts, as in its Gram matrices.
        text_of: the place of each expert's own text there.
    """
    rows = []
    for part in found.parts:
        grams = found.grams(part).tolist()
        for level in part.levels:
            for text in types:
                gram = grams[text_of[text]]
                rows += [(level, part.layer, part.name, text, *pair) for pair in _pairs(types, gram)]
    return rows


def _fold_rows(found: Compared, types: Sequence[str], text_of: Mapping[str, int]) -> list[tuple]:
    """The same fold by fold."""
    rows, tokens = [], found.tokens.tolist()
    for part in found.parts:
        means = (part.sums / found.tokens.clamp(min=1)[..., None, None]).tolist()
        for level in part.levels:
            for text in types:
                own = text_of[text]
                for fold, count in enumerate(tokens[own]):
                    if count:
                        place = (level, part.layer, part.name, text, fold, int(count))
                        rows += [(*place, *pair) for pair in _pairs(types, means[own][fold])]
    return rows


def _pairs(types: Sequence[str], gram: Sequence[Sequence[float]]) -> Iterator[tuple[str, str, float]]:
    """The entries of a symmetric matrix, each once."""
    for first, model in enumerate(types):
        for second in range(first, len(types)):
            yield model, types[second], gram[first][second]


def _tensor_rows(base: Subject, parts: Sequence[PartChanges]) -> list[tuple]:
    """The tensors of the parts, by their names in the base's checkpoint (its headers include the head).

    A tied parameter has the other one's tensor; where a checkpoint stores both, it has both, so that they are merged
    with one weight and stay equal.
    """
    model = base.decoder.model
    tied, components = tied_names(model), component_names(base)
    rows: list[tuple] = []
    held: dict[tuple[str, str], str] = {}  # by level and tensor: its parameter; of several (fused) the first has it
    nearest = _nearest_buffers(base, parts)
    for place, part in enumerate(parts):
        for level, name in [
            *((level, name) for level in part.levels for name in part.parameters),
            *nearest.get(place, ()),
        ]:
            names = [one for one in (name, tied.get(name)) if one in base.layout]
            for header in [header for one in names for header in base.layout.headers(one)]:
                if held.setdefault((level, header.name), tied.get(name, name)) == tied.get(name, name):
                    component = components.get(header.name, "")
                    rows.append((level, part.layer, part.name, header.name, component, math.prod(header.shape)))
    return rows


def _nearest_buffers(base: Subject, parts: Sequence[PartChanges]) -> dict[int, list[tuple[str, str]]]:
    """By place of a part, (level, name) of the stored buffers that lie nearest to its parameters (a router's bias)."""
    found: dict[int, list[tuple[str, str]]] = {}
    levels = dict.fromkeys(level for part in parts for level in part.levels)
    for name in (name for name, _ in base.decoder.model.named_buffers() if name in base.layout):
        near = [_common(name, part.parameters) for part in parts]
        layer = parts[near.index(max(near))].layer  # what is near in another layer, or another tower, is not its part
        for level in levels if max(near) > 0 else ():
            own = [
                score if level in part.levels and part.layer == layer else 0
                for score, part in zip(near, parts, strict=True)
            ]
            if max(own) > 0:
                found.setdefault(own.index(max(own)), []).append((level, name))
    return found


def _common(name: str, others: Sequence[str]) -> int:
    """How many first parts of dotted names a name has in common with the nearest of others."""
    path, most = name.split("."), 0
    for other in others:
        pairs = zip(path, other.split("."), strict=False)
        most = max(most, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return most


def _score_rows(found: Compared, types: Sequence[str]) -> list[tuple]:
    """The non-linearity scores of whole models, then of parts, without those of what is no larger part."""
    whole = [(WHOLE, -1, WHOLE, types[expert], score) for expert, score in sorted(found.whole.items())]
    return whole + [
        (level, part.layer, part.name, types[expert], score)
        for part in found.parts
        for level in part.levels
        if level != TENSOR
        for expert, score in sorted(part.scores.items())
    ]
