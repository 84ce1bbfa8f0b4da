"""Fetching models from the Hugging Face hub, with an answer a person can act on where that fails."""

import errno
import os
from pathlib import Path

from utils.errors import UserError, brief

_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files of a hub repository that match `patterns`, or find them in the cache; return their folder.

    Raises:
        UserError: there is no such repository or revision, access is refused, the hub cannot be reached, or the cache
            cannot be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = f"model {name}" + (f" at revision {revision}" if revision else "")
    here = f"no such folder here (in {Path.cwd()})"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns)).resolve()
    except HFValidationError as error:
        text = f"{shown}: neither a folder here (in {Path.cwd()}) nor a valid hub id"
        raise UserError(text, "hub-bad-name") from error
    except GatedRepoError as error:
        text = f"{shown} is gated: accept its terms on the hub and run `hf auth login`"
        raise UserError(text, "hub-gated") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{shown}: the hub has no such revision", "hub-no-revision") from error
    except RepositoryNotFoundError as error:
        text = f"{shown}: {here} and no such public repository on the hub; for a private one run `hf auth login`"
        raise UserError(text, "hub-no-repository") from error
    except (LocalEntryNotFoundError, OSError) as error:
        if error.errno in _CANNOT_WRITE:
            raise UserError(
                f"{shown}: the hub cache cannot be written: {error.strerror} ({error.filename}); set HF_HOME to a "
                "folder that can",
                "hub-cache-unwritable",
            ) from error
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
            text = f"{shown}: {here}, not in the local hub cache, and HF_HUB_OFFLINE is set"
            raise UserError(text, "hub-offline") from error
        text = f"{shown}: {here}, not in the local hub cache, and the hub cannot be reached ({type(error).__name__})"
        raise UserError(text, "hub-unreachable") from error
    except Exception as error:  # a proxy or client setting that the HTTP library does not understand
        raise UserError(f"{shown}: the hub cannot be reached: {brief(error)}", "hub-unreachable") from error
