"""Command 2's one job: what was measured -> densities or weights -> a recipe that mergekit runs, proven and published."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from utils.bounded_files import read_json
from utils.commands.options import DecideOptions
from utils.errors import UserError, warn
from utils.guidance.folder import check_folder, read_manifest
from utils.guidance.measured_pair import MeasuredPair, open_measured
from utils.guidance.recipe_choices import RecipeOptions, settle
from utils.models.model_trial import ModelTrial
from utils.plots import require_matplotlib
from utils.publishing.files import publish_files, repair_folder
from utils.publishing.target import locked_folder, prepare_folder, refuse_existing
from utils.recipes.recipe import check_file_names
from utils.recipes.recipe_manifest import COMMAND, manifest_name


def decide(options: DecideOptions) -> tuple[str, ...]:
    """Check, compute, prove and publish; print what was decided.

    Returns:
        The file names of the recipes in `out_dir`, the guided one first.

    Raises:
        UserError: anything the user can mend; nothing is written then.
    """
    choices = settle(options.config, _as_measured(options.recipe, options.delta_dfs_in_dir))
    if options.plot:
        require_matplotlib("--plot")
    prepare_folder(options.out_dir, "--out_dir")
    mended = repair_folder(options.out_dir)
    measured = open_measured(
        options.config,
        choices.method,
        options.delta_dfs_in_dir,
        trust_remote_code=options.trust_remote_code,
        accept_edited=options.accept_edited,
    )

    if not options.trust_remote_code:
        _try_configs(measured)

    # pandas and what is built on it, once nothing simpler can be wrong
    from utils.commands import decide_report as report
    from utils.commands.decide_pictures import pictures
    from utils.guidance.expert_tokens import read_tokens
    from utils.guidance.guided_recipe import control_recipe, guided_recipe
    from utils.guidance.portable_recipe import portable_recipe
    from utils.guidance.recipe_files import recipe_files
    from utils.guidance.routing import read_routing
    from utils.models.relative_change import strangers

    types = [one.type for one in options.config.experts]
    routing, tokens = (read(measured.folder, measured.manifest, types) for read in (read_routing, read_tokens))
    made = guided_recipe(measured, choices, folder=options.out_dir)
    control = None if options.control is None else control_recipe(measured, made, options.control)
    portable = portable_recipe(measured, made) if options.portable else None
    beside = [one for one in (control, portable) if one is not None]
    files = recipe_files(measured, made)
    for one in beside:
        files |= recipe_files(measured, made, one)
    if options.plot:
        files |= {f"{made.stem}_{end}": content for end, content in pictures(made).items()}
    check_file_names(list(files), options.config.path)
    if not options.quiet:
        report.say_choices(options, measured, made, routing, tokens)
    far = strangers(measured.models.checkpoints, options.config.base.type, [one.type for one in choices.experts])
    control_warnings = control.warnings if control else ()
    warn([*([mended] if mended else []), *measured.warnings, *far, *made.warnings, *control_warnings])
    remarks = () if options.quiet else made.decision.remarks()
    written = publish_changed(options.out_dir, files, overwrite=options.overwrite, last=True)
    if not options.quiet:
        report.say_result(made, control, remarks)
    names = (made.name, *(one.name for one in beside))
    report.say_files(options, measured, made, [one.name for one in beside if one is not portable], list(files), written)
    if portable is not None:
        report.say_portable(options, portable)
    return names


def _as_measured(recipe: RecipeOptions, folder: Path) -> RecipeOptions:
    """The options, with the merge method that a folder was measured for where that is the only one and none was asked for."""
    measured_for = recipe.method.measured_for
    if recipe.merge_method is not None or measured_for is None:
        return recipe
    manifest = read_manifest(folder) if folder.is_dir() else None
    check_folder(folder, manifest, recipe.method.name)
    return replace(recipe, merge_method=measured_for(folder))


def _try_configs(measured: MeasuredPair) -> None:
    """Try what the models' configs describe, where the merge will be planned by them; tokenizers are not loaded here.

    Raises:
        UserError: transformers hangs, crashes or takes too much memory over one.
    """
    checkpoints = measured.models.stored  # whose classes are not looked at yet: that is what is tried
    if measured.config.base.type in checkpoints:
        ModelTrial(((one.name, one.folder) for one in checkpoints.values()), tokenizers=False).check()


def publish_changed(folder: Path, files: Mapping[str, bytes], *, overwrite: bool, last: bool = False) -> list[str]:
    """Write the files that are not already there with these very bytes; return the names written.

    The manifest of a recipe that is there already, byte for byte, is brought up to date without `overwrite`.

    Raises:
        UserError: a file of that name holds something else and `overwrite` is false; nothing is written then.
    """
    with locked_folder(folder):
        changed = {name: content for name, content in files.items() if not _holds(folder / name, content)}
        kept = {manifest_name(name) for name in files.keys() - changed.keys() if name.endswith(".yaml")}
        ours = {name for name in kept & changed.keys() if _is_manifest(folder / name)}
        refuse_existing(folder, [name for name in changed if name not in ours], overwrite=overwrite)
        publish_files(folder, changed, overwrite=True, last=last)
    return list(changed)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a recipe, rather than a file of the user's that is called like one."""
    try:
        return read_json(path, path.name).get("command") == COMMAND
    except UserError:
        return False
