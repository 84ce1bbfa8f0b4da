"""Do the dataframes belong to this pair config? What the manifest recorded, compared with what is asked now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import Problem, raise_collected
from utils.models.checkpoints import is_local
from utils.models.headers import header_hash
from utils.models.settings_digest import settings_digest
from utils.pair.config import ModelEntry, PairConfig
from utils.recipes.naming import LocalModels

_MODEL_OPTIONS = ("model_info", "base_model_type")


def compare_with_manifest(
    config: PairConfig, experts: Sequence[ModelEntry], manifest: Mapping[str, Any] | None
) -> list[str]:
    """Compare the models and settings that were measured with the config's.

    Returns:
        Sentences about settings that differ (the numbers are usable, but not what this config would measure); empty
        without a manifest, whose absence `folder` warns about.

    Raises:
        UserError: another base or other experts were measured.
    """
    if manifest is None:
        return []
    options = manifest.get("options")
    recorded = options.get("model_info") if isinstance(options, dict) else None
    if not isinstance(recorded, list) or not all(isinstance(entry, dict) for entry in recorded):
        return ["manifest.json does not say which models were measured, so that cannot be checked"]
    by_type = {entry.get("type"): entry for entry in recorded}
    problems = []
    for entry in (config.base, *experts):
        found = by_type.get(entry.type)
        if found is None:
            problems.append(
                Problem(f"no {entry.type!r} was measured, only {', '.join(map(repr, by_type))}", "measured-without")
            )
        elif not _same_model(entry, found):
            text = f"{entry.type!r} was measured as {_shown(found)}, the config says {_shown(vars(entry))}"
            problems.append(Problem(text, "measured-other-model"))
    if options.get("base_model_type") != config.base_model_type:
        before = options.get("base_model_type")
        text = f"measured against the base type {before!r}, the config's is {config.base_model_type!r}"
        problems.append(Problem(text, "measured-other-base"))
    raise_collected(problems, "the dataframes belong to another pair config (measure again, or give that config)")
    now, then = _flat(config.options()), _flat(options)
    return [
        f"measured with {key} {then[key]!r}, the config now says {now[key]!r}; measure again if that matters"
        for key in now
        if key in then and then[key] != now[key]
    ]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings other than the models, nested ones as `dataset.seed`."""
    flat = {}
    for key, value in options.items():
        if key in _MODEL_OPTIONS:
            continue
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{inner}" if inner else key: item for inner, item in nested.items()}
    return flat


def changed_checkpoints(manifest: Mapping[str, Any] | None, models: LocalModels, *, accepted: bool) -> list[str]:
    """Refuse models on this machine whose weights are not those that were measured.

    Args:
        manifest: what the measurement says of itself.
        models: the models that lie here.
        accepted: take other weights, with a warning.

    Returns:
        Sentences about models whose weights are others, or (where a manifest has no sample of them) were saved again, and about
        those with other settings.

    Raises:
        UserError: weights are others, and that is not accepted; all models in one message.
    """
    listed = (manifest or {}).get("models")
    entries = listed if isinstance(listed, list) else []
    recorded = {entry.get("type"): entry for entry in entries if isinstance(entry, dict)}
    warnings, problems = [], []
    for model_type, checkpoint in models.stored.items():
        before = recorded.get(model_type, {})
        if sample := before.get("sample_sha256"):
            if sample != models.samples[model_type]:
                text = f"the weights of {checkpoint.name} ({model_type!r}) are not those that were measured"
                problems.append(Problem(text, "measured-other-weights"))
        elif before.get("header_sha256", digest := header_hash(checkpoint.stored.values())) != digest:
            name = checkpoint.name
            warnings.append(
                f"the weight files of {name} were saved again since they were measured; measure again if they changed"
            )
        if before.get("settings_sha256", settings := settings_digest(checkpoint)) != settings:
            warnings.append(
                f"config.json of {checkpoint.name} ({model_type!r}), or code beside it, is not what it was measured with; measure "
                "again if the model computes something else by it"
            )
    if accepted:
        return [*warnings, *(f"{problem.text}: the earlier measurement is used" for problem in problems)]
    raise_collected(
        problems, "measure again (lewis_importance.py --overwrite), or take the numbers as they are (--accept_edited)"
    )
    return warnings


def _same_model(entry: ModelEntry, found: Mapping[str, Any]) -> bool:
    name = found.get("name")
    if entry.revision != found.get("revision") or not isinstance(name, str):
        return False
    if name == entry.name:
        return True
    return is_local(name) and is_local(entry.name) and _place(name) == _place(entry.name)


def _place(name: str) -> Path:
    return Path(name).expanduser().resolve()


def _shown(entry: Mapping[str, Any]) -> str:
    revision = entry.get("revision")
    return f"{entry.get('name')!r}" + (f" at revision {revision!r}" if revision else "")
