"""How the models of a merge differ in what surrounds their weights, and what becomes of tensors that not all have."""

from collections.abc import Iterator, Mapping
from typing import Any

from utils.errors import Problem, UserError, raise_collected
from utils.merging.inputs import MergeInput, MergeInputs
from utils.merging.plan import MergePlan, gathered
from utils.models.mergekit_inputs import load_config, quiet_mergekit

_SHOWN = 4
# config.json keys that say nothing about what the tensors compute
_SILENT_KEYS = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map",
    "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "initializer_range", "attention_dropout",
    "_attn_implementation_autoset",
}  # fmt: skip


def check_configs(inputs: MergeInputs, *, trust_remote_code: bool) -> list[str]:
    """Compare the models' `config.json` with that of the donor, which the result gets.

    Returns:
        Warnings (sentences) about settings that differ.

    Raises:
        UserError: models that are merged whole have different numbers of layers.
    """
    donor = inputs.donor
    ours = _settings(donor.checkpoint.config)
    depth = _depth(donor, trust_remote_code)
    warnings, problems = [], []
    for model in inputs.models[1:]:
        if inputs.config.models is not None and (other := _depth(model, trust_remote_code)) != depth:
            text = (
                f"{model.checkpoint.name} has {other} layers, {donor.checkpoint.name} has {depth}; a whole merge needs "
                "equal depths (slices can combine different ones)"
            )
            problems.append(Problem(text, "merge-depths"))
        theirs = _settings(model.checkpoint.config)
        if model.checkpoint.architecture != donor.checkpoint.architecture:  # a language model beside one with a tower
            ours = _settings(donor.checkpoint.config.get("text_config") or donor.checkpoint.config)
        differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {ours.get(key)!r} and {theirs.get(key)!r}" for key in differing[:_SHOWN])
            more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            warnings.append(
                f"config.json of {donor.label} and {model.label} differ in {pairs}{more}; the result has the former's"
            )
    raise_collected(problems, "the models do not fit together")
    return warnings


def left_out(plan: MergePlan) -> Iterator[str]:
    """Warnings about stored tensors that the merge leaves out because no model class reads them."""
    for model in plan.inputs.models:
        names = plan.architecture.dropped.get(model.checkpoint.folder, ())
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            yield f"{model.label} has tensors that are left out, since the model class reads none of them ({len(names)}): {shown}"


def prove_coverage(plan: MergePlan) -> str:
    """Prove from the tasks themselves that they read every stored tensor, but for those known to be left out.

    Returns:
        A line that says so.

    Raises:
        UserError: the plan passes over a tensor.
    """
    if plan.inputs.config.models is None:
        return "coverage: the slices of the recipe decide which tensors are read"
    read, total = 0, 0
    converted = any(tensor.shape is None for tensor in plan.tensors)  # read under names that no task knows
    for model in plan.inputs.models:
        stored = set(model.checkpoint.tensors)
        used = {tensor.sources[model.reference].name for tensor in plan.tensors if model.reference in tensor.sources}
        passed = stored - used - set(plan.architecture.dropped.get(model.checkpoint.folder, ()))
        if passed and not converted:
            names = ", ".join(sorted(passed)[:_SHOWN])
            raise UserError(f"the merge would leave out {names} of {model.checkpoint.name}", "merge-left-out")
        read, total = read + len(used), total + len(stored)
    others = ", others through transformers' conversion" if converted else ""
    return f"coverage: {read} of {total} tensors of the inputs are read{others}"


def own_heads(plan: MergePlan) -> Iterator[str]:
    """Warnings about tensors that other models store and the donor only ties: does the result use them?"""
    donor = plan.inputs.donor
    for tensor in plan.tensors:
        if tensor.shape is None or donor.reference not in gathered(tensor.task).weight_info:
            continue  # a slice that takes nothing from the donor
        own = {tensor.name, *(tensor.weight.aliases or ())}
        header = tensor.sources.get(donor.reference)
        if header is not None and header.name in own:
            continue
        stored = [m.label for m in plan.inputs.models if (h := tensor.sources.get(m.reference)) and h.name in own]
        tied = getattr(plan.config, "tie_word_embeddings", False)
        use = "transformers ignores it, because config.json ties it" if tied else "it is used"
        where = f"{', '.join(stored)} but not by {donor.label}"
        yield f"{tensor.name} is stored by {where}; the result stores it, and {use}"


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _SILENT_KEYS}


def _depth(model: MergeInput, trust_remote_code: bool) -> int | None:
    with quiet_mergekit():
        config = load_config(model.checkpoint, trust_remote_code)
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
