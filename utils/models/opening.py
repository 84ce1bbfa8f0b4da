"""Opening a model: its headers, after its weights were fetched where it lies on the hub; an adapter's changes included.

Only safetensors weights are read: pickled ones can run code. No weights enter memory here.
"""

from pathlib import Path

from utils.errors import UserError
from utils.models.adapted import adapted
from utils.models.checkpoints import Checkpoint, find_small_files, is_local, local_folder, read_model_config
from utils.models.config_check import check_layers
from utils.models.headers import read_headers, weight_files
from utils.models.hub import download
from utils.models.low_rank import CONFIG, WEIGHTS, AdapterName, adapter_name
from utils.models.quantized import refuse_quantized
from utils.models.small_files import SMALL_FILES


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Open a local folder or hub id, weights included (a hub id is downloaded or found in the cache).

    `model+adapter`, or the folder of an adapter, is the model with the adapter's changes; `revision` is the model's.

    Raises:
        UserError: as `find_small_files` and `read_headers`; its weights are quantized; an adapter does not fit.
    """
    parts = adapter_name(name)
    if parts is not None:
        adapter = _adapter_folder(parts, fetch=True)
        return adapted(open_checkpoint(parts.model, revision), adapter, name)
    folder = find_small_files(name, revision)
    config = read_model_config(folder, name)
    if not is_local(name):
        folder = download(name, revision, [*SMALL_FILES, *weight_files(folder, name)])
    headers = read_headers(folder, name)
    refuse_quantized(headers.values(), name)
    check_layers(config, len(headers), name)
    return Checkpoint(name, revision, folder, config, headers)


def open_without_download(name: str, revision: str | None = None) -> Checkpoint | None:
    """Open a model that already lies on this machine, weights included; None if it does not. Nothing is fetched.

    Raises:
        UserError: a local folder exists but is malformed, as in `open_checkpoint`.
    """
    parts = adapter_name(name)
    if parts is not None:
        model, adapter = open_without_download(parts.model, revision), _adapter_folder(parts, fetch=False)
        return None if model is None or adapter is None else adapted(model, adapter, name)
    if is_local(name):
        return open_checkpoint(name, revision) if Path(name).expanduser().exists() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True)).resolve()
        return Checkpoint(name, revision, folder, read_model_config(folder, name), read_headers(folder, name))
    except (HFValidationError, LocalEntryNotFoundError, OSError, UserError):
        return None  # not in the hub cache, or only in part: the next download completes it


def _adapter_folder(parts: AdapterName, *, fetch: bool) -> Path | None:
    """Where an adapter lies; None if it is to be fetched first, and may not be."""
    if is_local(parts.adapter):
        return local_folder(parts.adapter)
    return download(parts.adapter, None, [CONFIG, WEIGHTS]) if fetch else None
