"""What a merged model says about itself: README.md, the recipe beside it, and the manifest.

No absolute path of this machine is written: a model that was named by one appears under its folder's name, and in the
recipe, which has to find it again, by its path relative to the output folder.
"""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.merging.planning import PlannedMerge
from utils.merging.provenance import origin_lines
from utils.merging.result_files import COMMAND, file_record
from utils.merging.saliency_plan import SaliencyFile
from utils.models.checkpoints import weight_file_record
from utils.named_paths import without_folders
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.recipes.method_rules import GRAM_MEAN, GUIDED_MEAN, GUIDED_TIES
from utils.runtime import versions

CARD = "README.md"
RECIPE = "mergekit_config.yml"
_PACKAGES = ("python", "torch", "transformers", "mergekit", "safetensors")
# This project's merge methods in words, and what they do by files of vectors (of a squared gradient, to a power).
OWN_METHOD_WORDS = {
    GUIDED_TIES.name: (
        "mergekit's `ties`, with the entries to keep chosen by saliency",
        "the entries of largest saliency (change squared, times {gradient})",
    ),
    GUIDED_MEAN.name: (
        "the mean of the changes, with each entry weighed by a power of its squared gradient",
        "each by how much the loss depends on it ({gradient})",
    ),
    GRAM_MEAN.name: (
        "the change that answers as each expert does on its own inputs",
        "the inputs and squared gradients of its own text",
    ),
}


@dataclass(frozen=True)
class CardAddition:
    """What a command knows about a merge beside the merge: entries of the card's metadata, and Markdown by heading."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)


def shown_recipe(done: PlannedMerge) -> str:
    """The recipe as the user wrote it, with absolute paths cut down to their last part."""
    return _ended(done.recipe.rewritten(without_folders))


def runnable_recipe(done: PlannedMerge) -> str:
    """The recipe as it runs again from the output folder: names of local folders and files are relative to that."""
    folder = done.settings.output_path.resolve()

    def from_there(name: str) -> str:
        parts = [Path(os.path.expanduser(part)) for part in map(done.recipe.locate, name.split("+"))]
        if not all(part.exists() for part in parts):
            return name  # a hub id
        return "+".join(os.path.relpath(part.resolve(), folder) for part in parts)

    return _ended(done.recipe.rewritten(from_there))


def card_text(done: PlannedMerge, added: CardAddition | None = None) -> str:
    """The model card, Markdown with the metadata block that the hub reads; what is added stands before the recipe."""
    plan = done.plan
    base = plan.inputs.config.base_model
    hub_ids = list(dict.fromkeys(name for model in plan.inputs.models for name in model.hub_ids))
    metadata = {"base_model": hub_ids} if hub_ids else {}
    adapter = done.settings.adapter
    metadata |= {"library_name": "peft" if adapter else "transformers", "tags": ["mergekit", "merge"]}
    added = added or CardAddition()
    metadata |= added.metadata
    experts = [model.label for model in plan.inputs.models if model.reference != base]
    if not experts and base:  # blocks of the base alone, in other places
        experts, base = [plan.inputs.label(base)], None
    onto = f" into `{plan.inputs.label(base)}`" if base else ""
    found = versions()
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=True).rstrip(),
        "---",
        f"# {done.settings.output_path.resolve().name}",
        "",
        f"A merge of {_listed(experts)}{onto} by {_method(done)}, computed in "
        f"{plan.dtype or 'the dtype of the inputs'} and saved {'as an adapter ' if adapter else ''}in {plan.out_dtype}.",
        "",
        *_density_table(done),
        *_saliency_lines(done),
        *(line for heading, text in added.sections.items() for line in (f"## {heading}", "", text.rstrip(), "")),
        "## Recipe",
        "",
        "```yaml",
        shown_recipe(done).rstrip(),
        "```",
        "",
        "## How it was made",
        "",
        *(origin_lines(done.origin) if done.origin else ()),
        f"- Seed {done.settings.random_seed}; tensor names by {plan.architecture.origin}.",
        f"- Vocabulary: {plan.vocabulary.summary}.",
        "- " + ", ".join(f"{name} {found[name]}" for name in _PACKAGES if name in found) + ".",
        f"- `{MANIFEST}` lists options, inputs with their hashes, and the files.",
        "",
    ]
    return "\n".join(lines)


def manifest(done: PlannedMerge, folder: Path, request: str) -> dict[str, Any]:
    """The manifest of a finished folder: what it was made of, how, and which files belong to it.

    `request` is the hash of everything that it depends on.
    """
    inputs = [
        {**weight_file_record(model.checkpoint), "name": model.label, **_content_hashes(done, model.checkpoint.files)}
        for model in done.plan.inputs.models
    ]
    return {
        "command": COMMAND,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "seed": done.settings.random_seed,
        "device": done.device,
        "merge_method": done.plan.method.spec.name,
        "dtype": done.plan.dtype,
        "out_dtype": done.plan.out_dtype,
        "architecture": done.plan.architecture.origin,
        "vocabulary": done.plan.vocabulary.summary,
        "recipe": {
            "name": done.recipe.path.name,
            "sha256": done.recipe.sha256,
            "published": {"name": RECIPE, "sha256": file_sha256(folder / RECIPE)},
        },
        "origin": done.origin.as_data() if done.origin else None,
        "options": done.settings.options(),
        "inputs": inputs,
        **({"saliency": _saliency_record(done)} if done.saliency else {}),
        "warnings": list(done.warnings),
        "request": request,
        **file_record(folder),
    }


def _content_hashes(done: PlannedMerge, files: list[Path]) -> Mapping[str, Any]:
    if not done.settings.hash_inputs:
        return {}
    return {"sha256": {file.name: file_sha256(file) for file in files}}


def _density_table(done: PlannedMerge) -> list[str]:
    if not done.densities:
        return []
    rows = [
        f"| `{one.label}` | {one.mean:.3f} | {one.low:.3f} | {one.high:.3f} | {one.guided} of {one.tensors} |"
        for one in done.densities
    ]
    return [
        "Share of each model's changes that was kept (density), over all parameters:",
        "",
        "| model | mean | lowest | highest | tensors below 1 |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _method(done: PlannedMerge) -> str:
    name = done.plan.method.spec.name
    return f"`{name}` ({OWN_METHOD_WORDS[name][0]})" if name in OWN_METHOD_WORDS else f"mergekit's `{name}`"


def _saliency_lines(done: PlannedMerge) -> list[str]:
    name = done.plan.method.spec.name
    lines = [
        f"- `{label}`: {OWN_METHOD_WORDS[name][1].format(gradient=_gradient(file))} in {count} tensors, by `{file.label}`"
        for file in done.saliency
        for label, count in file.tensors.items()
    ]
    return ["What was measured decided about each change:", "", *lines, ""] if lines else []


def _gradient(file: SaliencyFile) -> str:
    """The squared gradient to the power that a file of vectors was used with."""
    known = sorted(power for power in file.powers if power is not None)
    if known == [1.0] and None not in file.powers:
        return "the squared gradient"
    if not known or None in file.powers:
        return "the squared gradient, to the power that the file was made with"
    return f"the squared gradient to the power {' or '.join(f'{power:g}' for power in known)}"


def _saliency_record(done: PlannedMerge) -> list[dict[str, Any]]:
    return [
        {"name": file.label, "bytes": file.nbytes, "sha256": file.sha256, "tensors": dict(file.tensors)}
        for file in done.saliency
    ]


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]
