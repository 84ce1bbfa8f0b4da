"""A model's `config.json` as transformers reads it: an instance of its class's config."""

from pathlib import Path
from typing import Any

from utils.errors import UserError, brief


def class_config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The config in a model's folder; `name` is what to call the model.

    Raises:
        UserError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a malformed config makes transformers raise
        hint = "" if trust_remote_code else ", or, if the model needs code of its own, give --trust_remote_code"
        raise UserError(
            f"model {name}: config.json cannot be loaded ({brief(error)}); mend it{hint}", "model-config-unreadable"
        ) from error
