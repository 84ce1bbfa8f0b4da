"""The pair config: one YAML per base model and its experts, as a frozen value.

Every problem in the file is collected and reported at once. The keys are the reference's, plus `parity`, `seed`,
`seqlen`, a per-model `revision`, `dataset` as a mapping (see `utils/pair/calibration.py` for what it loads), `calibration`
(text per expert) and `guidance`.
"""

import dataclasses
import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import raise_collected
from utils.pair.source import MAX_SEED, MAX_SEQLEN, CalibrationSource, read_source, read_whole, unknown_keys
from utils.plain_values import is_homeless, is_plain_data, is_text, quote_hint, show
from utils.safe_yaml import read_yaml_mapping

CONFIG_KEYS = (
    "model_info",
    "dataset",
    "sparsity_ratio",
    "nsamples",
    "components",
    "base_model_type",
    "base_model_name",
    "target_model_names",
    "global_parameters",
    "prefix_mapping",
    "parity",
    "seed",
    "seqlen",
    "guidance",
    "calibration",
    "evaluation",
    "general",
    "search",
)
MODEL_KEYS = ("name", "type", "revision")
MAX_CONFIG_BYTES = 2**20
MAX_SAMPLES = 1_000_000
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODULE_PATH = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class ModelEntry:
    """One model of `model_info`: a hub id or local folder, and the type it is called by in columns and file names."""

    name: str
    type: str
    revision: str | None = None


@dataclass(frozen=True)
class PairConfig:
    """A validated pair config.

    `components` is None for `auto`; `parity` is True for `parity: reference`. `calibration` holds the text of the
    experts (by type) that have their own; the others share `dataset`. `guidance` is a method's name, None for the default.
    `evaluation` and `general` are as written (`utils/pair/evaluation.py` reads them), and so is `search`.
    """

    path: Path
    model_info: tuple[ModelEntry, ...]
    dataset: CalibrationSource
    sparsity_ratio: float
    nsamples: int
    components: tuple[str, ...] | None
    base_model_type: str
    base_model_name: str
    target_model_names: Mapping[str, str]
    global_parameters: Mapping[str, Any]
    prefix_mapping: Mapping[str, str]
    parity: bool
    guidance: str | None = None
    calibration: Mapping[str, CalibrationSource] = dataclasses.field(default_factory=dict)
    evaluation: Any = None
    general: Any = None
    search: Any = None

    @property
    def base(self) -> ModelEntry:
        """The model that every expert is compared with."""
        return next(entry for entry in self.model_info if entry.type == self.base_model_type)

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """Every model but the base, in the order of `model_info`."""
        return tuple(entry for entry in self.model_info if entry.type != self.base_model_type)

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
            "dataset": dataclasses.asdict(self.dataset),
            "sparsity_ratio": self.sparsity_ratio,
            "nsamples": self.nsamples,
            "components": "auto" if self.components is None else list(self.components),
            "base_model_type": self.base_model_type,
            "prefix_mapping": dict(self.prefix_mapping),
            "parity": "reference" if self.parity else None,
            "calibration": {key: dataclasses.asdict(source) for key, source in self.calibration.items()},
        }


def read_pair_config(path: str | Path) -> PairConfig:
    """Read and check a pair config.

    Raises:
        UserError: the file cannot be read, or holds problems; all of them are in the one message.
    """
    path = Path(os.path.expanduser(path))
    raw = read_yaml_mapping(path, "pair config", MAX_CONFIG_BYTES)
    return _Reader(path, raw).read()


class _Reader:
    """Walks the raw mapping once and collects a problem per mistake."""

    def __init__(self, path: Path, raw: dict[Any, Any]) -> None:
        self.path, self.raw = path, raw
        self.problems: list[str] = []

    def read(self) -> PairConfig:
        self.problems += unknown_keys(self.raw, CONFIG_KEYS, "")
        models = self._models()
        base_type = self._text("base_model_type", "base")
        base_name = self._base_name(models, base_type)
        seed, seqlen = self._defaults()
        config = PairConfig(
            path=self.path,
            model_info=models,
            dataset=read_source(self.raw.get("dataset", "mbpp"), "dataset", seed, seqlen, self.problems),
            sparsity_ratio=self._real("sparsity_ratio", 0.0),
            nsamples=read_whole(self.raw, "nsamples", 15, 1, MAX_SAMPLES, self.problems),
            components=self._components(),
            base_model_type=base_type,
            base_model_name=base_name,
            target_model_names=self._targets(models, base_type),
            global_parameters=self._global_parameters(),
            prefix_mapping=self._prefix_mapping(),
            parity=self._parity(),
            guidance=self._guidance(),
            calibration=self._calibration(seed, seqlen, models, base_type),
            evaluation=self.raw.get("evaluation"),
            general=self.raw.get("general"),
            search=self.raw.get("search"),
        )
        self._prefixes_cover_components(config)
        raise_collected(self.problems, f"pair config {self.path}")
        return config

    def _models(self) -> tuple[ModelEntry, ...]:
        raw = self.raw.get("model_info")
        if not isinstance(raw, list) or not raw:
            self.problems.append("model_info must list the models: one {name, type} for the base and one per expert")
            return ()
        entries = [entry for i, item in enumerate(raw) if (entry := self._model(item, f"model_info[{i}]"))]
        seen: dict[str, str] = {}
        for entry in entries:
            folded = entry.type.casefold()  # two types that differ in case share a file on some file systems
            if folded in seen:
                self.problems.append(f"model_info: type {entry.type!r} is given twice ({seen[folded]!r} before)")
            seen[folded] = entry.type
        for (name, _), count in Counter((entry.name, entry.revision) for entry in entries).items():
            if count > 1:
                self.problems.append(f"model_info: model {name!r} is listed twice; each model is measured once")
        if len(raw) < 2:
            self.problems.append("model_info names only one model; a pair needs the base and at least one expert")
        return tuple(entries)

    def _model(self, item: Any, where: str) -> ModelEntry | None:
        if not isinstance(item, dict):
            self.problems.append(f"{where} must be a mapping with name and type, got {show(item)}")
            return None
        self.problems += unknown_keys(item, MODEL_KEYS, f"{where}.")
        texts = {}
        for key in ("name", "type"):
            value = item.get(key)
            if not is_text(value):
                self.problems.append(f"{where}.{key} must be text{quote_hint(value)}, got {show(value)}")
            else:
                texts[key] = value
        revision = item.get("revision")
        if revision is not None and not is_text(revision):
            self.problems.append(f"{where}.revision must be text{quote_hint(revision)}, got {show(revision)}")
            revision = None
        if "name" in texts and is_homeless(texts["name"]):
            self.problems.append(f"{where}.name {show(texts['name'])}: no such user's home folder; write the full path")
        if "type" in texts and not _TYPE.fullmatch(texts["type"]):
            self.problems.append(
                f"{where}.type {show(texts['type'])} becomes part of file names: use at most 64 letters, digits, "
                "'_', '-' and '.', beginning with a letter or digit"
            )
        return ModelEntry(revision=revision, **texts) if len(texts) == 2 else None

    def _base_name(self, models: tuple[ModelEntry, ...], base_type: str) -> str:
        entry = next((entry for entry in models if entry.type == base_type), None)
        if models and entry is None:
            types = ", ".join(model.type for model in models)
            self.problems.append(f"base_model_type {base_type!r} is not a type in model_info (types there: {types})")
        name = self._text("base_model_name", entry.name if entry else "")
        if entry and name != entry.name:
            self.problems.append(
                f"base_model_name {name!r} differs from the {base_type!r} entry of model_info, {entry.name!r}"
            )
        return name

    def _targets(self, models: tuple[ModelEntry, ...], base_type: str) -> dict[str, str]:
        experts = {entry.type: entry.name for entry in models if entry.type != base_type}
        raw = self.raw.get("target_model_names")
        if raw is None:
            return experts
        if not isinstance(raw, dict) or not raw:
            self.problems.append("target_model_names must map each expert's type to its model name")
            return experts
        for key, name in raw.items():
            if not is_text(key) or not is_text(name):
                self.problems.append(f"target_model_names: {show(key)}: {show(name)} must be text: text")
            elif key == base_type:
                self.problems.append(f"target_model_names names the base type {key!r}; it lists experts only")
            elif key not in experts:
                near = difflib.get_close_matches(key, experts, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self.problems.append(f"target_model_names: type {key!r} is not an expert in model_info{hint}")
            elif name != experts[key]:
                self.problems.append(
                    f"target_model_names: {key!r} is {name!r} here but {experts[key]!r} in model_info; "
                    "the model that is measured must be the one that is merged"
                )
        return {key: name for key, name in raw.items() if is_text(key) and is_text(name)}

    def _defaults(self) -> tuple[int, int]:
        """`seed` and `seqlen` of texts that do not say their own."""
        return (
            read_whole(self.raw, "seed", CalibrationSource.seed, 0, MAX_SEED, self.problems),
            read_whole(self.raw, "seqlen", CalibrationSource.seqlen, 2, MAX_SEQLEN, self.problems),
        )

    def _calibration(
        self, seed: int, seqlen: int, models: tuple[ModelEntry, ...], base_type: str
    ) -> dict[str, CalibrationSource]:
        raw = self.raw.get("calibration")
        if raw is None:
            return {}
        if not isinstance(raw, dict) or not raw:
            self.problems.append(
                f"calibration must map an expert's type to its text, such as {{math: gsm8k}}, got {show(raw)}"
            )
            return {}
        experts = [entry.type for entry in models if entry.type != base_type]
        for key in raw:
            if key == base_type:
                self.problems.append(f"calibration names the base type {key!r}; it lists experts only")
            elif key not in experts:
                near = difflib.get_close_matches(str(key)[:80], experts, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"experts: {', '.join(experts)}"
                self.problems.append(f"calibration: type {show(key)} is not an expert in model_info; {hint}")
        absent = [] if self.raw.get("dataset") is not None else [name for name in experts if name not in raw]
        for name in absent:
            self.problems.append(
                f"calibration has no text for type {name!r}, and there is no dataset for it; add either"
            )
        return {
            str(key): read_source(value, f"calibration.{key}", seed, seqlen, self.problems)
            for key, value in raw.items()
        }

    def _guidance(self) -> str | None:
        raw = self.raw.get("guidance")
        if raw is not None and not is_text(raw):
            self.problems.append(f"guidance must be the name of a method, such as lewis, got {show(raw)}")
            return None
        return raw

    def _components(self) -> tuple[str, ...] | None:
        raw = self.raw.get("components", "auto")
        if raw == "auto":
            return None
        if not isinstance(raw, list) or not raw:
            self.problems.append(f"components must be 'auto' or a list of names such as q_proj, got {show(raw)}")
            return None
        for item in raw:
            if not is_text(item):
                self.problems.append(f"components: {show(item)} must be text{quote_hint(item)}")
            elif not _MODULE_PATH.fullmatch(item):
                self.problems.append(f"components: {show(item)} must be a name such as q_proj or mlp.c_proj")
        names = [item for item in raw if is_text(item)]
        self.problems += [f"components: {name!r} is listed twice" for name, n in Counter(names).items() if n > 1]
        return tuple(names)

    def _prefix_mapping(self) -> dict[str, str]:
        raw = self.raw.get("prefix_mapping")
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self.problems.append(f"prefix_mapping must map component to module path, got {show(raw)}")
            return {}
        for key, value in raw.items():
            if not is_text(key) or not is_text(value):
                self.problems.append(f"prefix_mapping: {show(key)}: {show(value)} must be text: text")
            elif not _MODULE_PATH.fullmatch(value):
                self.problems.append(
                    f"prefix_mapping.{key}: {value!r} must be a module path inside a block, such as self_attn.q_proj"
                )
        return {key: value for key, value in raw.items() if is_text(key) and is_text(value)}

    def _prefixes_cover_components(self, config: PairConfig) -> None:
        if config.components and config.prefix_mapping:
            for name in config.components:
                if name not in config.prefix_mapping:
                    self.problems.append(f"prefix_mapping has no entry for component {name!r}")

    def _global_parameters(self) -> dict[str, Any]:
        raw = self.raw.get("global_parameters")
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self.problems.append(f"global_parameters must be a mapping of merge parameters, got {show(raw)}")
            return {}
        for key, value in raw.items():
            if not is_text(key):
                self.problems.append(f"global_parameters: key {show(key)} must be text")
            elif not is_plain_data(value):
                self.problems.append(
                    f"global_parameters.{key} must be a finite number, true, false, text, or a list of these, got "
                    f"{show(value)}"
                )
        return dict(raw)

    def _parity(self) -> bool:
        raw = self.raw.get("parity")
        if raw in (None, False):
            return False
        if raw != "reference":
            self.problems.append(f"parity must be 'reference' or left out, got {show(raw)}")
        return True

    def _text(self, key: str, default: str) -> str:
        value = self.raw.get(key, default)
        if not is_text(value) and not (key not in self.raw):
            self.problems.append(f"{key} must be text{quote_hint(value)}, got {show(value)}")
            return default
        return value

    def _real(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            hint = f"; {value}% is {value / 100:g}" if isinstance(value, int) and 1 < value <= 99 else ""
            hint = "; write it with a point, such as 0.001" if isinstance(value, str) else hint
            self.problems.append(f"{key} must be a number of at least 0 and below 1, got {show(value)}{hint}")
            return default
        return float(value)
