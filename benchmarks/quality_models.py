"""The models of the quality benchmark: a small base and one expert per task, trained from nothing, cached by content.

A trained folder is named by a hash of everything that made it: settings, text, seed, and the version of the training
code. It appears complete or not at all, and is never trained twice. A base that experts of other lengths already start from is
taken from their folder. Weights are stored in float32.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_texts import Texts
from benchmarks.quality_training import MADE, Fitted, Saves, fit
from demo.small_model import Shape, new_model, train_tokenizer, windows
from utils.publishing.manifest import to_json
from utils.publishing.staging import staged_folder

CODE_VERSION = 1  # raise it when a change below changes what is trained


@dataclass(frozen=True)
class Training:
    """One size: the shape and everything that decides its training. Steps are of `batch` windows each.

    `tied`: whether the head is the embedding.
    """

    shape: Shape
    window: int = 256
    batch: int = 2
    base_steps: int = 1200
    expert_steps: int = 450
    base_rate: float = 3e-3
    expert_rate: float = 6e-4
    weight_decay: float = 0.05
    tied: bool = True

    def made_of(self) -> dict[str, Any]:
        """The settings as plain data; a head of its own is mentioned where there is one."""
        found = dataclasses.asdict(self)
        if self.tied:
            del found["tied"]
        return found


SMALL = Training(Shape(hidden=192, intermediate=448, blocks=8, heads=6))
TINY = Training(Shape(hidden=96, intermediate=256, blocks=4, heads=4), base_steps=800, expert_steps=300)
MEDIUM = Training(Shape(hidden=256, intermediate=640, blocks=10, heads=8), base_rate=2e-3, expert_rate=5e-4)


@dataclass(frozen=True)
class Trained:
    """Folders of one seed's models: the base and its experts by task."""

    base: Path
    experts: dict[str, Path]

    @property
    def seconds(self) -> float:
        """How long their training took."""
        return json.loads((self.base.parent / MADE).read_text()).get("seconds", 0.0)


def train_or_find(
    training: Training, texts: Texts, seed: int, cache: Path, device: str = "cpu", until: float | None = None
) -> Trained:
    """Find the models of one size and seed in `cache`, or train them there, until a time (seconds since the epoch).

    What was cut goes on from its last save. One process at a time trains a seed.

    Raises:
        OutOfTimeError: that time is over.
    """
    precision = precision_of(device)
    name = _digest(training, texts, seed, precision)
    folder = cache / f"{training.shape.hidden}x{training.shape.blocks}_seed{seed}_{name[:16]}"
    if not (folder / MADE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        saves = Saves(folder.with_name(f"{folder.name}_unfinished"), until)
        with staged_folder(folder) as stage:
            same = _folder_with_base(folder, _base_digest(training, texts, seed, precision))
            fitted = _train_all(training, texts, seed, stage, device, precision, saves, same)
            losses, seconds = ({key: getattr(one, what) for key, one in fitted.items()} for what in ("loss", "seconds"))
            made = {"digest": name, "training": training.made_of(), "seed": seed, "losses": losses}
            made["base"] = _base_digest(training, texts, seed, precision)
            how = {"precision": precision, "text": texts.origin, "seconds": sum(seconds.values())}
            (stage / MADE).write_bytes(to_json(made | how))
        shutil.rmtree(saves.folder, ignore_errors=True)
    return Trained(folder / "base", {task: folder / task for task in texts.tasks})


def _folder_with_base(folder: Path, digest: str) -> Path | None:
    """A finished folder beside this one whose base was made by the same, if there is one."""
    same_shape = sorted(folder.parent.glob(f"{folder.name.rpartition('_')[0]}_*/{MADE}"))
    return next((made.parent for made in same_shape if json.loads(made.read_text()).get("base") == digest), None)


def _train_all(
    training: Training,
    texts: Texts,
    seed: int,
    folder: Path,
    device: str,
    precision: str,
    saves: Saves,
    same_base: Path | None,
) -> dict[str, Fitted]:
    import torch
    from safetensors.torch import load_model

    rows = [*texts.base, *(row for task in texts.tasks.values() for row in task.train)]
    tokenizer = train_tokenizer(rows, training.shape.vocabulary)
    model = new_model(training.shape, tokenizer, seed, tied=training.tied).to(device)
    figures = {}

    def publish(name: str, own: Sequence[str], steps: int, rate: float) -> None:
        data = windows(own, tokenizer, training.window)
        how = {"steps": steps, "rate": rate, "seed": seed, "precision": precision}
        figures[name] = fit(model, data, training, **how, name=name, saves=saves)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    if same_base is None:
        publish("base", texts.base, training.base_steps, training.base_rate)
    else:
        shutil.copytree(same_base / "base", folder / "base")
        load_model(model, folder / "base" / "model.safetensors", device=device)
        figures["base"] = Fitted(json.loads((same_base / MADE).read_text())["losses"]["base"], 0.0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, task in texts.tasks.items():
        with torch.no_grad():
            model.load_state_dict(start)
        publish(name, task.train, training.expert_steps, training.expert_rate)
    return figures


def precision_of(device: str) -> str:
    """Bfloat16 products where the machine has instructions for them; elsewhere they would be slower than float32."""
    import torch

    if device == "cpu":
        return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"


def _base_digest(training: Training, texts: Texts, seed: int, precision: str) -> str:
    """A digest of what makes the base alone, its tokenizer included, which the experts' text is read for, too."""
    own = {key: value for key, value in training.made_of().items() if not key.startswith("expert_")}
    return _digest_of(own, texts, seed, precision)


def _digest(training: Training, texts: Texts, seed: int, precision: str) -> str:
    return _digest_of(training.made_of(), texts, seed, precision)


def _digest_of(training: Mapping[str, Any], texts: Texts, seed: int, precision: str) -> str:
    made_of = {
        "code": CODE_VERSION,
        "training": training,
        "texts": [texts.base, *((name, task.train) for name, task in texts.tasks.items())],
        "seed": seed,
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
