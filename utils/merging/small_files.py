"""The files of a merged model beside its weights: config, tokenizer, templates, card, recipe, manifest.

mergekit leaves some of the base's files out (generation config and templates when it builds a tokenizer, `vocab.json`
tokenizers); they are copied here.
"""

from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from utils.errors import UserError, brief
from utils.mergekit_api import set_chat_template, set_config_value
from utils.merging.model_card import CARD, RECIPE, CardAddition, card_text, manifest, runnable_recipe
from utils.merging.planning import PlannedMerge
from utils.models.tokenizer_files import copy_chat_template, copy_missing, copy_tokenizer
from utils.publishing.disk import named_in_errors
from utils.publishing.manifest import MANIFEST, content_sha256, to_json
from utils.recipes.recipe_manifest import manifest_name


def write_small_files(ready: PlannedMerge, folder: Path) -> None:
    """Write config and tokenizer of the result, and copy what the base has beside them.

    Raises:
        UserError: the base's config cannot be written; a file to copy is linked from elsewhere.
        OSError: the disk is full, and so on.
    """
    plan, donor = ready.plan, ready.plan.inputs.donor.checkpoint.folder
    if plan.vocabulary.size is not None:
        key = plan.architecture.info.vocab_size_config_key or "vocab_size"
        set_config_value(plan.config, key, plan.vocabulary.size)
    try:
        with named_in_errors(folder / "config.json"):
            plan.config.save_pretrained(folder)
    except Exception as error:  # transformers checks some values only when they are written
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk is full, and so on; transformers raises others of that kind, which have no number
        name = plan.inputs.donor.checkpoint.name
        text = f"model {name}: transformers cannot save its config.json: {brief(error)}"
        raise UserError(text, "merge-config-unwritable") from error
    copy_missing(donor, folder, ready.copied)
    if plan.vocabulary.task is not None or ready.settings.copy_tokenizer or plan.vocabulary.asked:
        _write_tokenizer(ready, donor, folder)


def describe_result(ready: PlannedMerge, folder: Path, added: CardAddition | None = None, request: str = "") -> int:
    """Write card, recipe and, last, the manifest. Returns the bytes of all files.

    Args:
        ready: the merge.
        folder: where its result lies.
        added: what else the card says.
        request: the hash of everything that the result depends on.
    """
    recipe = runnable_recipe(ready).encode()
    files = {RECIPE: recipe}
    if ready.settings.write_model_card:
        files[CARD] = card_text(ready, added).encode()
    if ready.origin:  # beside the published recipe, as command 2 left it beside the one that ran
        its = {"name": RECIPE, "sha256": content_sha256(recipe)}
        files[manifest_name(RECIPE)] = replace(ready.origin, recipe=its).as_bytes()
    for name, content in files.items():
        _write(folder / name, content)
    described = manifest(ready, folder, request)
    content = to_json(described)
    _write(folder / MANIFEST, content)
    return sum(described["bytes"].values()) + len(content)


def _write(path: Path, content: bytes) -> None:
    with named_in_errors(path):
        path.write_bytes(content)


def _write_tokenizer(ready: PlannedMerge, donor: Path, folder: Path) -> None:
    config, info = ready.plan.inputs.config, ready.plan.vocabulary.info
    trust = ready.settings.trust_remote_code
    if info is None and not config.chat_template:
        copy_tokenizer(donor, folder)
        return
    tokenizer = info.tokenizer if info else AutoTokenizer.from_pretrained(donor, trust_remote_code=trust)
    if config.chat_template:
        set_chat_template(tokenizer, config, trust_remote_code=trust)
    with named_in_errors(folder):
        tokenizer.save_pretrained(folder)
    if not config.chat_template:
        copy_chat_template(donor, folder)
