"""Everything about a merge that can be known before weights are read: checked, and said to the user.

Only configs, headers, tokenizers, flags and the disk are looked at. What comes out is a plan that `utils/merging/run.py`
carries out.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from utils.merging.adapter import check_adapter_fits
from utils.merging.inputs import FoundModels, MergeInputs
from utils.merging.loading import check_donor_loads
from utils.merging.output_folder import OutputFolder, check_apart, check_space
from utils.merging.planning import PlannedMerge, plan_models
from utils.merging.resources import memory_estimate
from utils.merging.settings import MergeSettings
from utils.models.relative_change import strangers
from utils.models.small_files import check_copied
from utils.models.tokenizer_files import copied_names, small_bytes
from utils.runtime import available_bytes, gigabytes

_SPARE = 2**20  # bytes for config, card and manifest


def preflight(
    settings: MergeSettings, found: FoundModels, output: OutputFolder, say: Callable[[str], None]
) -> PlannedMerge:
    """Plan a merge, and check that its result has a place of its own and finds room.

    Args:
        settings: the flags.
        found: the checked recipe and its models.
        output: the output folder, already checked in itself.
        say: takes the lines of the report, as the facts become known.

    Raises:
        UserError: anything the user can mend; see the functions this calls.
    """

    def apart(inputs: MergeInputs) -> None:
        check_apart(settings.output_path, [(one.checkpoint.name, one.checkpoint.folder) for one in inputs.models])

    planned = plan_models(settings, found, say, apart)
    donor = planned.plan.inputs.donor.checkpoint.folder
    check_copied(donor, [*copied_names(donor), *planned.copied])
    if planned.plan.vocabulary.task is not None or planned.plan.inputs.config.chat_template == "auto":
        models = [model.checkpoint.folder for model in planned.plan.inputs.models]
        for folder in (*models, *planned.token_donors):  # mergekit may write any model's tokenizer and chat template
            check_copied(folder, copied_names(folder))
    if settings.adapter:
        check_adapter_fits(planned)
    else:
        check_donor_loads(planned.plan, settings.trust_remote_code)
    short = _check_space(planned, output, say)
    return replace(planned, warnings=(*planned.warnings, *_no_fine_tunes(planned.plan.inputs), *short))


def _no_fine_tunes(inputs: MergeInputs) -> list[str]:
    """Sentences about models whose weights are too far from the base's; of a merge without a base there are none."""
    if inputs.config.base_model is None:
        return []
    checkpoints = {one.label: replace(one.checkpoint, name=one.label) for one in inputs.models}  # fit to be published
    return strangers(checkpoints, inputs.donor.label, list(checkpoints))


def _check_space(planned: PlannedMerge, output: OutputFolder, say: Callable[[str], None]) -> Iterator[str]:
    """Compare disk and memory with what the merge needs; a warning if memory looks short."""
    plan, device = planned.plan, torch.device(planned.device)
    needed = plan.nbytes + small_bytes(plan.inputs.donor.checkpoint.folder) + _SPARE
    free = check_space(output, needed)
    say(f"disk: {gigabytes(needed)} for the result, {gigabytes(free)} free")
    memory, available = memory_estimate(plan, planned.division, planned.settings), available_bytes(device)
    say(f"memory: about {gigabytes(memory)} on {device.type} beside the runtime; {gigabytes(available)} free")
    if memory > available:
        yield (
            f"the merge needs about {gigabytes(memory)} of memory, {device} has {gigabytes(available)} free; a smaller "
            "--out_shard_size, dtype: bfloat16 in the recipe, or density 1 for the embeddings need less"
        )
