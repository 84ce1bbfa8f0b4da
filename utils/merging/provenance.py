"""What the recipe of a merge was made of, as command 2 recorded it, on its way into the merged model's own files."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from utils.named_paths import without_folders
from utils.recipes.recipe_manifest import PORTABLE, RecipeManifest


def publishable(origin: RecipeManifest) -> RecipeManifest:
    """The same record without folders of this machine: of an absolute path, and of a file of vectors, the last part remains."""
    found = replace(origin, **{field.name: _without_folders(getattr(origin, field.name)) for field in fields(origin)})
    return replace(found, vectors={Path(name).name: sha256 for name, sha256 in origin.vectors.items()})


def origin_lines(origin: RecipeManifest) -> Iterator[str]:
    """What a model card says about it: guidance with its options, and the text that was measured on."""
    what = f"Guidance `{origin.guidance}`"
    if origin.control == PORTABLE:
        what = f"For stock mergekit, means of what guidance `{origin.guidance}` gives"
    elif origin.control is not None:
        what = f"An unguided control (`{origin.control}`) beside guidance `{origin.guidance}`"
    yield f"- {what}{_listed(' with', origin.guidance_options)}."
    if origin.measure_options:
        yield f"- Measured{_listed(' with', origin.measure_options)}."
    for text in origin.samples if isinstance(origin.samples, list) else [origin.samples]:
        if isinstance(text, Mapping) and text.get("path"):
            rows = text.get("rows")
            count = f"{len(rows)} samples of " if isinstance(rows, list) else ""
            parts = [f"{key} {text[key]}" for key in ("subset", "split", "seed") if text.get(key) is not None]
            more = f" ({', '.join(parts)})" if parts else ""
            yield f"- Measured on {count}`{text['path']}`{more}."
    if origin.search:
        yield _found_by(origin.search)
    if origin.measurement:
        yield f"- SHA-256 of the measurement's manifest: `{origin.measurement.get('sha256')}`."


def _found_by(search: Mapping[str, Any]) -> str:
    """Which trial of a search the recipe was, and on which rows it was chosen."""
    rows = ", ".join(f"{count} of {task}" for task, count in search.get("validation_rows", {}).items())
    return (
        f"- Found by a search: trial {search.get('trial')} of {search.get('trials')} (sampler {search.get('sampler')}, seed "
        f"{search.get('seed')}), chosen by {search.get('objective')} gain kept on validation rows ({rows})."
    )


def _listed(before: str, options: Mapping[str, Any]) -> str:
    given = [f"{name} {value}" for name, value in options.items() if value is not None]
    return f"{before} {', '.join(given)}" if given else ""


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(one) for one in value]
    return value
