"""LoRA adapters named in a merge recipe as `model+adapter`: read as changes of the model, or merged once into a cache.

With a cache they are merged by mergekit and peft, then plain model folders: stock mergekit's numbers. mergekit keeps what a crash left half-written and does not notice a changed adapter of the same
name. Here the cache entry is complete or absent, and its name holds a hash of the adapter and of the model's headers.
"""

import hashlib
import os
import shutil
from pathlib import Path

from utils.errors import UserError
from utils.models.adapted import adapted
from utils.models.checkpoints import Checkpoint, is_local, local_folder
from utils.models.headers import header_hash
from utils.models.hub import download
from utils.models.low_rank import CONFIG, WEIGHTS, adapter_name
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.peft_trial import check_before_peft
from utils.models.tokenizer_files import copy_tokenizer
from utils.publishing.manifest import file_sha256
from utils.publishing.staging import staged_folder


def check_adapter(shown: str, adapter: str) -> None:
    """Explain what `a+b` means where a folder is called so, and look for the adapter's own.

    Raises:
        UserError: there is a folder of that name; there is none of the adapter's.
    """
    if os.path.exists(os.path.expanduser(shown)):
        raise UserError(
            f"model {shown}: mergekit reads '+' as 'model+LoRA adapter', but a folder has this very name; write "
            f"model: {{model: {{path: {shown!r}}}}}",
            "adapter-folder-name",
        )
    if is_local(adapter):
        local_folder(adapter)


def changed_checkpoint(model: Checkpoint, adapter: str, revision: str | None, shown: str) -> Checkpoint:
    """A model with an adapter's changes, made as its tensors are read.

    Raises:
        UserError: the adapter lacks its files, is of another kind, or does not fit the model.
    """
    return adapted(model, _adapter_files(adapter, revision), shown)


def refuse_adapter(place: str, shown: str) -> None:
    """Refuse an adapter in the place of a model: a recipe names both.

    Raises:
        UserError: the folder holds an adapter.
    """
    if os.path.isdir(os.path.expanduser(place)) and (parts := adapter_name(place)) is not None:
        raise UserError(
            f"model {shown} is a LoRA adapter; write {parts.model}+{shown}, the model and the adapter",
            "model-is-adapter",
        )


def merged_folder(model: Checkpoint, adapter: str, revision: str | None, cache: Path, dtype: str | None) -> Path:
    """Merge an adapter into its model through mergekit and peft, or find that done in the cache.

    The whole model is loaded into memory.

    Args:
        model: the model the adapter was trained on.
        adapter: folder or hub id of the adapter.
        revision: the adapter's revision on the hub.
        cache: the cache folder; one folder per model, adapter and dtype is made in it.
        dtype: of the merged weights; None for the model's own.

    Raises:
        UserError: the adapter lacks its files or does not fit the model.
    """
    folder = _adapter_files(adapter, revision)
    dtype = dtype or model.float_dtype
    parts = (header_hash(model.tensors.values()), file_sha256(folder / CONFIG), file_sha256(folder / WEIGHTS), dtype)
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
    target = cache.resolve() / f"{model.folder.name}_{folder.name}_{key}"
    if not target.exists():
        check_before_peft(folder, adapter, [tensor.rpartition(".")[0] for tensor in model.tensors])
        with staged_folder(target) as stage:
            _merge(model, folder, adapter, stage, dtype)
    return target


def _merge(model: Checkpoint, adapter: Path, name: str, stage: Path, dtype: str) -> None:
    from utils.mergekit_api import ModelPath, ModelReference

    reference = ModelReference(model=ModelPath(path=str(model.folder)), lora=ModelPath(path=str(adapter)))
    try:
        with quiet_mergekit():
            merged = Path(reference.merged(cache_dir=str(stage), lora_merge_dtype=dtype).model.path)
    except (ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"LoRA adapter {name} cannot be merged into {model.name}: {first}", "adapter-unfit") from error
    for path in list(merged.iterdir()):
        shutil.move(path, stage / path.name)
    merged.rmdir()
    copy_tokenizer(model.folder, stage)


def _adapter_files(name: str, revision: str | None) -> Path:
    folder = local_folder(name, revision) if is_local(name) else download(name, revision, [CONFIG, WEIGHTS])
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"LoRA adapter {name}: {folder} has no {file} that is a regular file", "adapter-no-files")
    return folder
