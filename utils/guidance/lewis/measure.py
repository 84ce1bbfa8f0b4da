"""LEWIS, measure half: norms of the base and the experts, and the delta tables they make."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from utils.errors import UserError
from utils.guidance.lewis.deltas import delta_table
from utils.guidance.lewis.tables import TEXT, table_files
from utils.guidance.lewis.visitor import LewisVisitor
from utils.guidance.measure_job import Measured, MeasureJob, OnBlock, Work
from utils.passes.block_runner import run_blocks
from utils.passes.subjects import EncodedText, Subject


def choices(job: MeasureJob) -> list[str]:
    """Lines that say how a job will be measured."""
    config = job.config
    names = ", ".join(part.name for part in job.base.decoder.components)
    lines = [f"components: {names} ({'as configured' if config.components else 'every linear part of a block'})"]
    if config.parity:
        lines.append("parity: reference (samples padded with EOS, pads attended and counted, means over samples)")
    if config.sparsity_ratio:
        lines.append(f"pruning while measuring: {config.sparsity_ratio:g} of each row, by the Wanda metric")
    return lines


def measure(job: MeasureJob) -> Measured:
    """Norms of the base on every text and of each expert on its own."""
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
    job: MeasureJob, subject: Subject, text: EncodedText, label: str, device: torch.device, on_block: OnBlock
) -> list[dict[str, Any]]:
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
                f"finite in {subject.dtype}; check the checkpoint, or use --dtype float32 or bfloat16",
                "measured-not-finite",
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
