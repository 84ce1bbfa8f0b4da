"""The license that a model states: what the metadata block of its card says."""

from pathlib import Path

CARD = "README.md"
_MOST_BYTES = 2**20


def stated_license(folder: Path) -> str:
    """The license in the card's metadata: the hub's identifier, or the name of one that has none; "" if none is stated.

    A card that cannot be read states nothing: it describes the model and is no part of it.
    """
    import yaml
    from huggingface_hub import metadata_load

    card = folder / CARD
    try:
        if not card.is_file() or card.stat().st_size > _MOST_BYTES:
            return ""
        data = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ""
    stated = data.get("license")
    if stated == "other" and isinstance(data.get("license_name"), str):
        stated = data["license_name"]
    if isinstance(stated, list) and all(isinstance(each, str) for each in stated):
        return ", ".join(stated)
    return stated if isinstance(stated, str) else ""
