"""Whether transformers loads a model folder whole, asked of transformers itself with all parameters on the meta device.

Its own loading matches every tensor, but no weights enter memory.
"""

from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import AutoConfig

from utils.errors import UserError, brief, is_memory
from utils.mergekit_api import get_auto_cls
from utils.merging.plan import MergePlan
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.planned_tensors import some_of


@dataclass(frozen=True)
class LoadingReport:
    """Parameters that the folder lacks, and those whose shape there is another than config.json makes it."""

    missing: tuple[str, ...]
    misshapen: tuple[str, ...]


def loading_report(folder: Path, trust_remote_code: bool) -> LoadingReport:
    """Load a folder by the class that its config.json names.

    Raises:
        Exception: whatever transformers raises over a folder that it cannot load.
    """
    with quiet_mergekit():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        own = getattr(transformers, config.architectures[0], None)
        named = own is not None and "auto_map" not in vars(config)
        model_class = own if named else get_auto_cls(config.architectures[0])
        _, report = model_class.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    # Unknown names were in the base, too, and were reported before the merge.
    found = (report.get(key) or () for key in ("missing_keys", "mismatched_keys"))
    names = (sorted(str(one[0] if isinstance(one, tuple) else one) for one in own) for own in found)
    return LoadingReport(*map(tuple, names))


def check_donor_loads(plan: MergePlan, trust_remote_code: bool) -> None:
    """Refuse a base that transformers does not load whole: the result, which has its config and names, would not either.

    Raises:
        UserError: it cannot be loaded, lacks parameters that are not planned, or has tensors of other shapes than its
            config.json makes them (those aside that get their rows from a joined vocabulary).
    """
    donor = plan.inputs.donor.checkpoint
    try:
        report = loading_report(donor.folder, trust_remote_code)
    except Exception as error:  # of any kind; the check of the result would meet it again
        if is_memory(error):
            raise
        raise UserError(
            f"model {donor.name}: transformers cannot load it as {donor.architecture}, and could not load the result: "
            f"{brief(error)}",
            "model-unloadable",
        ) from error
    known = {*plan.architecture.spellings, *(tensor.name for tensor in plan.tensors)}
    if absent := [name for name in report.missing if name not in known]:
        raise UserError(
            f"model {donor.name}: transformers finds no weights for {some_of(absent)} of {donor.architecture} in it, and "
            "would find none in the result; is config.json that of these weights?",
            "model-unloadable",
        )
    resized = plan.vocabulary.size is not None  # which config.json then says, too
    new_rows = {tensor.name for tensor in plan.tensors if tensor.vocabulary_axis is not None and resized}
    if other := [name for name in report.misshapen if plan.architecture.spellings.get(name, name) not in new_rows]:
        raise UserError(
            f"model {donor.name}: {some_of(other)} have other shapes there than config.json makes them, and would have in "
            "the result; is config.json that of these weights?",
            "model-shape",
        )
