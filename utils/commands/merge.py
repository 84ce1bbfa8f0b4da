"""A merge from settings to a published folder: preflight, run, check, card, manifest, rename."""

import logging
import os
import shutil
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.commands.evaluation_folder import Measured, read_measured
from utils.errors import UserError, warn
from utils.merging.inputs import find_models
from utils.merging.output_folder import (
    OutputFolder,
    check_apart,
    check_output,
    check_place,
    existing_merge,
    refuse_changed_merge,
)
from utils.merging.pieces.finished import FinishedTensors
from utils.merging.recipe_check import check_recipe
from utils.merging.recipe_file import MergeRecipe, in_float32, read_recipe
from utils.merging.result_files import read_result_manifest
from utils.merging.settings import MergeSettings
from utils.models.headers import INDEX
from utils.models.model_trial import ModelTrial
from utils.models.page_cache import AHEAD, read_ahead
from utils.publishing.manifest import MANIFEST
from utils.publishing.siblings import PROGRESS, put_back, sweep
from utils.publishing.staging import staged_folder, stamp
from utils.runtime import available_host_bytes, devices_used, gigabytes, import_libraries, peak_gpu_memory

if TYPE_CHECKING:
    from utils.merging.planning import PlannedMerge

REPORT = "report.html"
# the same merge ends so every time, or is another one by now
_FINAL = ("merge-not-finite", "merge-result-wrong", "merge-result-unloadable", "merge-settings-changed")
_LOG_LEVELS = (logging.ERROR, logging.INFO, logging.DEBUG)


def merge(settings: MergeSettings) -> None:
    """Merge as the settings say, and print what was done.

    Raises:
        UserError: anything the user can mend. The output folder is then as it was.
    """
    if settings.transformers_cache:  # read once, when huggingface_hub is imported
        os.environ["HF_HUB_CACHE"] = str(settings.transformers_cache.resolve())
    recipe = read_recipe(settings.merge_config)
    if settings.adapter:
        recipe = in_float32(recipe)
    measured = read_measured(settings.evaluation, recipe)
    output = _output_folder(settings, recipe)
    ready = _checked(settings, recipe, output)

    from utils.merging.request import request_hash, work_key

    request = request_hash(ready)
    if output.request and output.request != request:
        raise existing_merge(settings.output_path)
    if output.request:
        refuse_changed_merge(settings.output_path)
    if settings.dry_run:
        print("dry run: everything was checked, nothing was written")
        return
    swept = sweep(output.target, None if output.request or settings.restart else work_key(request))
    warn([swept] if swept else ())
    if output.request:
        _say_there(settings)
        return
    _publish(ready, output, request, measured)


def _output_folder(settings: MergeSettings, recipe: MergeRecipe) -> OutputFolder:
    """The output folder, checked as far as that goes before models are looked at; one that a kill left moved aside is put back."""
    check_apart(settings.output_path, recipe.local_folders())
    check_place(settings.output_path)
    restored = "" if settings.dry_run else put_back(settings.output_path)
    warn([restored] if restored else ())  # at once: what is refused next may be what is back
    return check_output(settings.output_path, overwrite=settings.overwrite, recipe=recipe.sha256)


def _checked(settings: MergeSettings, recipe: MergeRecipe, output: OutputFolder) -> "PlannedMerge":
    """The merge, planned and checked as far as that goes before weights are read."""
    found = find_models(check_recipe(recipe))
    if not settings.dry_run:
        read_ahead(found.checkpoints.values(), min(AHEAD, available_host_bytes() // 4))
    logging.basicConfig(level=_LOG_LEVELS[settings.verbosity])
    _set_up_libraries(settings)
    models = ((str(name), folder) for name, folder in found.folders.items() if not name.lora)
    trial = None if settings.trust_remote_code else ModelTrial(models, loaded_again=False)

    from utils.merging.preflight import preflight

    if trial is not None:
        trial.check()
    ready = preflight(settings, found, output, lambda line: _say([line], settings))
    warn(ready.warnings)
    return ready


def _publish(ready: "PlannedMerge", output: OutputFolder, request: str, measured: Measured | None) -> None:
    """Merge into a folder beside the output, check and describe the result, and put it in its place."""
    from utils.commands.merge_report import card_addition, report_html
    from utils.merging.request import request_hash, work_key
    from utils.merging.small_files import describe_result

    settings, start = ready.settings, time.perf_counter()
    with staged_folder(
        output.target,
        replaceable=output.replaceable,
        key=work_key(request),
        is_there=partial(_is_there, output, request),
        say=lambda line: _say([line], settings),
        last=True,
        is_of_use=lambda error: not _is_final(error) and ready.can_be_merged_again(),
    ) as stage:
        if stage is None:
            _say_there(settings)
            return
        finished = FinishedTensors(stage / PROGRESS, work_key(request))
        _clear(stage, bool(finished.sums))
        report = _write_adapter(ready, stage) if settings.adapter else _write_model(ready, stage, finished)
        seconds = time.perf_counter() - start
        if settings.report:
            (stage / REPORT).write_text(report_html(ready, measured, seconds), encoding="utf-8")
        written = describe_result(ready, stage, card_addition(ready, measured), request)
        if request_hash(ready) != request:
            text = "a config, tokenizer or card of a model changed while it was merged, so nothing was published; merge again"
            raise UserError(text, "merge-settings-changed")
    _say(report, settings)
    _say_where(ready, written, seconds)


def _write_model(ready: "PlannedMerge", stage: Path, finished: FinishedTensors) -> Iterable[str]:
    """Merge, and write the model. Returns lines about it."""
    from utils.merging.result_check import check_result
    from utils.merging.run import run_merge
    from utils.merging.small_files import write_small_files

    run_merge(ready, stage, finished)
    ready.check_unchanged()
    write_small_files(ready, stage)
    return check_result(ready.plan, ready.settings, stage)


def _write_adapter(ready: "PlannedMerge", stage: Path) -> Iterable[str]:
    """Merge, and write what changes about the base. Returns lines about it."""
    from utils.merging.adapter import write_adapter

    report = write_adapter(ready, stage, lambda line: _say([line], ready.settings))
    ready.check_unchanged()
    return [report]


def _is_final(error: BaseException) -> bool:
    """Whether what has stopped the merge lies in its numbers or in its result, so that to go on would end there again."""
    return isinstance(error, UserError) and any(code in _FINAL for code in error.codes)


def _is_there(output: OutputFolder, request: str) -> bool:
    """Whether another run has published this very merge since the output folder was checked."""
    manifest = read_result_manifest(output.target)
    if manifest is None or manifest.get("request") != request:
        return False
    before = output.replaceable.get(MANIFEST)
    return before is None or stamp(output.target / MANIFEST) != before


def _clear(stage: Path, resumed: bool) -> None:
    """Remove what an earlier run may have left half written: everything, or all but the weights that are gone on with."""
    for path in stage.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not resumed or not (path.name in (PROGRESS, INDEX) or path.suffix == ".safetensors"):
            path.unlink()


def _say_there(settings: MergeSettings) -> None:
    print(f"{settings.output_path} already holds exactly this merge; nothing to do (--overwrite makes it again)")


def _set_up_libraries(settings: MergeSettings) -> None:
    import_libraries("utils.mergekit_api")

    import torch
    import transformers

    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    transformers.utils.logging.disable_progress_bar()
    if not settings.verbosity:
        transformers.utils.logging.set_verbosity_error()


def _say(lines: Iterable[str], settings: MergeSettings) -> None:
    if not settings.quiet:
        print(*lines, sep="\n", flush=True)


def _say_where(ready: "PlannedMerge", written: int, seconds: float) -> None:
    folder = str(ready.settings.output_path)
    peak = peak_gpu_memory(devices_used(ready.device, all_of_them=ready.settings.multi_gpu))
    print(f"\nmerged in {seconds:.2f} s{peak}; wrote {gigabytes(written)} to {folder}\nload it with\n")
    loading = "peft import AutoPeft" if ready.settings.adapter else "transformers import Auto"
    print(f"    from {loading}ModelForCausalLM")
    print(f"    model = {loading.split()[-1]}ModelForCausalLM.from_pretrained({folder!r})")
