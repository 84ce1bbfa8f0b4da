"""The pair config: one YAML per base model and its experts, as a frozen value.

Every problem in the file is collected and reported at once. The keys are the reference's, and: `parity`, `seed`,
`seqlen`, a per-model `revision`, `dataset` as a mapping (see `utils/pair/calibration.py` for what it loads),
`calibration` (text per expert), `general` (text of no expert's), `guidance`, `evaluation` and `search`.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from utils.errors import Problem
from utils.pair.components import Components, ModulePath
from utils.pair.evaluation import TaskText, TextByTask
from utils.pair.search import SearchSettings
from utils.pair.source import CalibrationSource, Place, Seed, SequenceLength, TextByKey, TextSource
from utils.safe_yaml import is_plain_data, read_yaml_mapping
from utils.suggestions import suggestion
from utils.validation import Mistakes, Text, checked, read_checked, refuse, show

MAX_CONFIG_BYTES = 2**20
MAX_SAMPLES = 1_000_000
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _file_name_part(text: str) -> str:
    if not _TYPE.fullmatch(text):
        raise Mistakes(
            Problem(
                f"{show(text)} becomes part of file names: use at most 64 letters, digits, '_', '-' and '.', beginning "
                "with a letter or digit",
                "bad-type",
            )
        )
    return text


@checked
class ModelEntry:
    """One model of `model_info`: a hub id or local folder, and the type it is called by in columns and file names."""

    name: Place
    type: Annotated[Text, AfterValidator(_file_name_part)]
    revision: Text | None = None


# --- checks of one key, given the keys above it (`known.data`) ---------------------------------------------------------


def _listed_models(raw: Any) -> Any:
    if not isinstance(raw, list) or not raw:
        text = "must list the models: one {name, type} for the base and one per expert"
        raise Mistakes(Problem(text, "no-models"))
    if len(raw) < 2:
        raise Mistakes(Problem("names only one model; a pair needs the base and at least one expert", "one-model"))
    return raw


def _each_model_once(models: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
    problems, seen = [], {}
    for entry in models:
        folded = entry.type.casefold()  # two types that differ in case share a file on some file systems
        if folded in seen:
            text = f": type {entry.type!r} is given twice ({seen[folded]!r} before)"
            problems.append(Problem(text, "type-twice"))
        seen[folded] = entry.type
    for (name, _), count in Counter((entry.name, entry.revision) for entry in models).items():
        if count > 1:
            text = f": model {name!r} is listed twice; each model is measured once"
            problems.append(Problem(text, "model-twice"))
    refuse(problems)
    return models


def _type_of_a_model(base_type: str, known: ValidationInfo) -> str:
    types = [entry.type for entry in known.data.get("model_info", ())]
    if types and base_type not in types:
        text = f"{show(base_type)} is not a type in model_info (types there: {', '.join(types)})"
        raise Mistakes(Problem(text, "unknown-base"))
    return base_type


def _name_of_the_base(name: str | None, known: ValidationInfo) -> str:
    base_type = known.data.get("base_model_type")
    entry = next((entry for entry in known.data.get("model_info", ()) if entry.type == base_type), None)
    if entry is None:
        return name or ""
    if name not in (None, entry.name):
        text = f"{name!r} differs from the {base_type!r} entry of model_info, {entry.name!r}"
        raise Mistakes(Problem(text, "other-base"))
    return entry.name


def _experts(known: ValidationInfo) -> dict[str, str] | None:
    """Name by type of every model but the base; None if the keys above are not right, which is said of them."""
    if not {"model_info", "base_model_type"} <= known.data.keys():
        return None
    return {entry.type: entry.name for entry in known.data["model_info"] if entry.type != known.data["base_model_type"]}


def _not_experts(types: Iterable[Any], known: ValidationInfo) -> list[Problem]:
    experts, base_type = _experts(known), known.data.get("base_model_type")
    problems = []
    for key in types if experts is not None else ():
        if key == base_type:
            problems.append(Problem(f"names the base type {key!r}; it lists experts only", "base-as-expert"))
        elif key not in experts:
            hint = suggestion(key, experts, f"experts: {', '.join(experts)}")
            problems.append(Problem(f": type {show(key)} is not an expert in model_info; {hint}", "unknown-expert"))
    return problems


def _merged_experts(targets: Mapping[str, str] | None, known: ValidationInfo) -> Mapping[str, str]:
    experts = _experts(known)
    if targets is None:
        return experts or {}
    if not targets:
        raise Mistakes(Problem("must map each expert's type to its model name", "no-targets"))
    problems = _not_experts(targets, known)
    for key, name in targets.items():
        if experts and name != experts.get(key, name):
            text = (
                f": {key!r} is {name!r} here but {experts[key]!r} in model_info; the model that is measured must be the "
                "one that is merged"
            )
            problems.append(Problem(text, "other-target"))
    refuse(problems)
    return targets


def _text_per_expert(raw: Any, known: ValidationInfo) -> Any:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        text = f"must map an expert's type to its text, such as {{math: gsm8k}}, got {show(raw)}"
        raise Mistakes(Problem(text, "wrong-type"))
    refuse(_not_experts(raw, known))
    return raw


def _a_text_for_every_expert(texts: Mapping[str, Any], known: ValidationInfo) -> Mapping[str, Any]:
    if texts and known.context is not None and "dataset" not in known.context:
        refuse(
            Problem(f"has no text for type {name!r}, and there is no dataset for it; add either", "no-text")
            for name in _experts(known) or ()
            if name not in texts
        )
    return texts


def _a_prefix_for_every_component(prefixes: Mapping[str, str], known: ValidationInfo) -> Mapping[str, str]:
    if prefixes:
        absent = [name for name in known.data.get("components") or () if name not in prefixes]
        refuse(Problem(f"has no entry for component {name!r}; add one", "no-prefix") for name in absent)
    return prefixes


def _recipe_value(value: Any) -> Any:
    if not is_plain_data(value):
        text = f"must be a finite number, true, false, text, or a list of these, got {show(value)}"
        raise Mistakes(Problem(text, "bad-parameter"))
    return value


def _is_reference(raw: Any) -> bool:
    if raw not in (None, False, "reference"):
        raise Mistakes(Problem(f"must be 'reference' or left out, got {show(raw)}", "unknown-value"))
    return raw == "reference"


def _not_a_percentage(raw: Any) -> Any:
    if type(raw) is int and 1 < raw <= 99:
        raise Mistakes(Problem(f"must be below 1, got {raw}; {raw}% is {raw / 100:g}", "out-of-range"))
    return raw


def _or_nothing(raw: Any) -> Any:
    return {} if raw is None else raw


@checked(kw_only=True)
class PairSettings:
    """What stands in a pair config, one field per key; a field's checks may look at the fields above it.

    `components` is None for `auto`; `parity` is True for `parity: reference`. `calibration` holds the text of the
    experts (by type) that have their own; the others share `dataset`. `guidance` is a method's name, None for the
    default. `evaluation` is the text of each task that is evaluated on, by its name.
    """

    model_info: Annotated[tuple[ModelEntry, ...], BeforeValidator(_listed_models), AfterValidator(_each_model_once)]
    base_model_type: Annotated[Text, AfterValidator(_type_of_a_model)] = "base"
    base_model_name: Annotated[Text | None, AfterValidator(_name_of_the_base)] = None
    target_model_names: Annotated[Mapping[Text, Text] | None, AfterValidator(_merged_experts)] = None
    seed: Seed = 42
    seqlen: SequenceLength = 512
    nsamples: Annotated[int, Field(strict=True, ge=1, le=MAX_SAMPLES)] = 15
    dataset: TextSource = "mbpp"
    calibration: Annotated[TextByKey, BeforeValidator(_text_per_expert), AfterValidator(_a_text_for_every_expert)] = (
        field(default_factory=dict)
    )
    general: TaskText | None = None
    sparsity_ratio: Annotated[float, Field(strict=True, ge=0, lt=1), BeforeValidator(_not_a_percentage)] = 0.0
    components: Components = "auto"
    prefix_mapping: Annotated[
        Mapping[Text, ModulePath], BeforeValidator(_or_nothing), AfterValidator(_a_prefix_for_every_component)
    ] = field(default_factory=dict)
    global_parameters: Annotated[
        Mapping[Text, Annotated[Any, AfterValidator(_recipe_value)]], BeforeValidator(_or_nothing)
    ] = field(default_factory=dict)
    parity: Annotated[bool, BeforeValidator(_is_reference)] = False
    guidance: Text | None = None
    evaluation: Annotated[TextByTask, BeforeValidator(_or_nothing)] = field(default_factory=dict)
    search: Annotated[SearchSettings, BeforeValidator(_or_nothing)] = field(default_factory=SearchSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(PairSettings):
    """A validated pair config, and the file it stands in."""

    path: Path

    @property
    def base(self) -> ModelEntry:
        """The model that every expert is compared with."""
        return next(entry for entry in self.model_info if entry.type == self.base_model_type)

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """Every model but the base, in the order of `model_info`."""
        return tuple(entry for entry in self.model_info if entry.type != self.base_model_type)

    @property
    def experts_to_merge(self) -> tuple[ModelEntry, ...]:
        """The experts that are merged, in the order of `target_model_names`."""
        by_type = {entry.type: entry for entry in self.experts}
        return tuple(by_type[name] for name in self.target_model_names)

    def text_of(self, expert: str) -> CalibrationSource:
        """The calibration text of an expert, by type."""
        return self.calibration.get(expert, self.dataset)

    @property
    def texts(self) -> tuple[CalibrationSource, ...]:
        """Every text that experts are measured on, each once, in the order of the experts."""
        return tuple(dict.fromkeys(self.text_of(entry.type) for entry in self.experts))

    def options(self) -> dict[str, Any]:
        """The settings that decide what is measured, as plain data (for manifests)."""
        return {
            "model_info": [dataclasses.asdict(entry) for entry in self.model_info],
            "dataset": self.dataset.plain(),
            "sparsity_ratio": self.sparsity_ratio,
            "nsamples": self.nsamples,
            "components": "auto" if self.components is None else list(self.components),
            "base_model_type": self.base_model_type,
            "prefix_mapping": dict(self.prefix_mapping),
            "parity": "reference" if self.parity else None,
            "calibration": {key: source.plain() for key, source in self.calibration.items()},
        }


def read_pair_config(path: str | Path) -> PairConfig:
    """Read and check a pair config.

    Raises:
        UserError: the file cannot be read, or holds problems; all of them are in the one message.
    """
    path = Path(os.path.expanduser(path))
    raw = read_yaml_mapping(path, "pair config", MAX_CONFIG_BYTES)
    found = read_checked(PairSettings, raw, f"pair config {path}", "config", context=frozenset(raw))
    return PairConfig(path=path, **{each.name: getattr(found, each.name) for each in fields(found)})
