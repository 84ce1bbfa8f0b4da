"""One seed's pair in the form the three commands take: configs, calibration text, and what each method measured."""

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality_clock import Clock
from benchmarks.quality_models import Trained
from benchmarks.quality_texts import Texts
from utils.commands.decide import decide
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.commands.options import DecideOptions
from utils.errors import UserError
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.guidance.recipe_choices import RecipeOptions
from utils.pair.config import PairConfig, read_pair_config

CALIBRATION_SAMPLES = 48  # at most; every method gets the same ones
LONGEST = 256  # tokens of a sample


@dataclass(frozen=True)
class Pair:
    """A base and its experts. `folder` holds everything that is made of them; `both` and `alone` are pair configs."""

    folder: Path
    trained: Trained
    both: Path
    alone: Mapping[str, Path]
    configs: Mapping[Path, PairConfig] = field(repr=False)
    clock: Clock = field(repr=False)


def lay_out(
    trained: Trained, texts: Texts, folder: Path, until: float | None = None, samples: int = CALIBRATION_SAMPLES
) -> Pair:
    """Write calibration text and pair configs: one that merges all experts, and one per expert alone.

    At most so many `samples` of each task are measured on. No work on the pair is begun after `until` (seconds since the
    epoch).
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = {"base": trained.base, **trained.experts}
    calibration = {}
    for task, own in texts.tasks.items():
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in own.calibration), encoding="utf-8")
        calibration[task] = {"path": str(file), "text": "{text}", "seqlen": LONGEST}
    settings = {
        "model_info": [{"name": str(path), "type": name} for name, path in models.items()],
        "calibration": calibration,
        "nsamples": min(samples, *(len(own.calibration) for own in texts.tasks.values())),
    }
    places = {"both": list(trained.experts), **{task: [task] for task in trained.experts}}
    files = {}
    for name, experts in places.items():
        files[name] = folder / f"{name}.yaml"
        targets = {"target_model_names": {task: str(trained.experts[task]) for task in experts}}
        files[name].write_text(yaml.safe_dump({**settings, **targets}, sort_keys=False), encoding="utf-8")
    both = files.pop("both")
    configs = {path: read_pair_config(path) for path in (both, *files.values())}
    return Pair(folder, trained, both, files, configs, Clock(folder / "seconds.json", until))


def measured(pair: Pair, guidance: str, device: str, name: str = "", **flags: Any) -> Path:
    """The dataframe folder of a method, measured now if it is not there; command 1's own function.

    `name` is what to call the measurement, if it has `flags` of command 1 that are not the defaults.
    """
    method = guidance_methods()[guidance]
    config = pair.configs[pair.both]
    folder = pair.folder / f"measured_{name or guidance}"
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    options = MeasureOptions(config, method, defaults(method, "measure") | flags, folder, device=device)
    with pair.clock.work(f"measure {name or guidance}"), quiet[0], quiet[1]:
        try:
            measure_pair(options)
        except UserError as error:
            if error.code != "out-exists":
                raise
            measure_pair(replace(options, overwrite=True))  # by other versions, or of other models
    return folder


def recipe_of(
    pair: Pair, config: Path, guidance: str, flags: Mapping[str, Any], device: str, folder: Path | None = None
) -> tuple[Path, ...]:
    """The recipes that command 2's own function makes, the guided one first.

    Args:
        pair: the pair.
        config: one of its configs.
        guidance: the method.
        flags: flags of command 2 by name; those not named have their defaults.
        device: where to measure.
        folder: what was measured, if not by default.
    """
    method = guidance_methods()[guidance]
    flags = dict(flags)
    own = defaults(method, "decide") | {key: flags.pop(key) for key in defaults(method, "decide") if key in flags}
    shared = {"lambda_" if key == "lambda" else key: value for key, value in flags.items()}
    control, out = shared.pop("control", None), pair.folder / "recipes"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        names = decide(
            DecideOptions(
                config=pair.configs[config],
                recipe=RecipeOptions(method, own, **shared),
                delta_dfs_in_dir=folder or measured(pair, guidance, device),
                out_dir=out,
                control=control,
                overwrite=True,
            )
        )
    return tuple(out / name for name in names)


def defaults(method: GuidanceMethod, half: str) -> dict[str, Any]:
    """A method's own flags with their defaults."""
    return {flag.name: flag.default for flag in method.flags(half)}
