"""A merge from settings to a published folder: preflight, run, check, card, manifest, rename."""

import logging
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from utils.commands.evaluation_folder import read_measured
from utils.merging.inputs import find_models
from utils.merging.output_folder import check_apart, check_output
from utils.merging.recipe_check import check_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.settings import MergeSettings
from utils.models.page_cache import AHEAD, read_ahead
from utils.publish import left_over, staged_folder
from utils.runtime import available_host_bytes, devices_used, gigabytes, import_libraries, peak_gpu_memory

if TYPE_CHECKING:
    from utils.merging.planning import PlannedMerge

REPORT = "report.html"
_LOG_LEVELS = (logging.ERROR, logging.INFO, logging.DEBUG)


def merge(settings: MergeSettings) -> None:
    """Merge as the settings say, and print what was done.

    Raises:
        UserError: anything the user can mend. The output folder is then as it was.
    """
    if settings.transformers_cache:  # read once, when huggingface_hub is imported
        os.environ["HF_HUB_CACHE"] = str(settings.transformers_cache.resolve())
    recipe = read_recipe(settings.merge_config)
    measured = read_measured(settings.evaluation, recipe)
    check_apart(settings.output_path, recipe.local_folders())
    output = check_output(settings.output_path, overwrite=settings.overwrite)
    found = find_models(check_recipe(recipe), settings.lora_merge_cache)
    if not settings.dry_run:
        read_ahead(found.checkpoints.values(), min(AHEAD, available_host_bytes() // 4))
    _set_up_libraries(settings)

    from utils.merging.preflight import preflight

    ready = preflight(settings, found, output, lambda line: _say([line], settings))
    _warn(ready.warnings)
    _warn(f"a killed run has left {folder}; remove it" for folder in left_over(output.target))
    if settings.dry_run:
        print("dry run: everything was checked, nothing was written")
        return

    from utils.commands.merge_report import card_addition, report_html
    from utils.merging.result_check import check_result
    from utils.merging.run import run_merge
    from utils.merging.small_files import describe_result, write_small_files

    start = time.perf_counter()
    with staged_folder(output.target, replaceable=output.replaceable) as stage:
        run_merge(ready, stage)
        ready.check_unchanged()
        seconds = time.perf_counter() - start
        write_small_files(ready, stage)
        report = check_result(ready.plan, settings, stage)
        if settings.report:
            (stage / REPORT).write_text(report_html(ready, measured, seconds), encoding="utf-8")
        written = describe_result(ready, stage, card_addition(ready, measured))
    _say(report, settings)
    _say_where(ready, written, seconds)


def _set_up_libraries(settings: MergeSettings) -> None:
    logging.basicConfig(level=_LOG_LEVELS[settings.verbosity])

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


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _say_where(ready: "PlannedMerge", written: int, seconds: float) -> None:
    folder = str(ready.settings.output_path)
    peak = peak_gpu_memory(devices_used(ready.device, all_of_them=ready.settings.multi_gpu))
    print(f"\nmerged in {seconds:.2f} s{peak}; wrote {gigabytes(written)} to {folder}\nload it with\n")
    print("    from transformers import AutoModelForCausalLM")
    print(f"    model = AutoModelForCausalLM.from_pretrained({folder!r})")
