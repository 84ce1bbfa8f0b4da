"""The models of the quality benchmark: a small base and one expert per task, trained from nothing, cached by content.

A trained folder is named by a hash of everything that made it: settings, text, seed, and the version of the training
code. It appears complete or not at all, and is never trained twice. Weights are stored in float32.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quality_texts import Texts
from demo.small_model import Shape, new_model, train_tokenizer, windows
from utils.publishing.manifest import to_json
from utils.publishing.staging import staged_folder

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

CODE_VERSION = 1  # raise it when a change below changes what is trained
MADE = "made.json"


@dataclass(frozen=True)
class Training:
    """One size: the shape and everything that decides its training. Steps are of `batch` windows each."""

    shape: Shape
    window: int = 256
    batch: int = 2
    base_steps: int = 1200
    expert_steps: int = 450
    base_rate: float = 3e-3
    expert_rate: float = 6e-4
    weight_decay: float = 0.05


SMALL = Training(Shape(hidden=192, intermediate=448, blocks=8, heads=6))
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


def train_or_find(training: Training, texts: Texts, seed: int, cache: Path, device: str = "cpu") -> Trained:
    """Find the models of one size and seed in `cache`, or train them there.

    Several processes may work in one cache: whoever finishes first publishes, the other's work is dropped.
    """
    precision = precision_of(device)
    name = _digest(training, texts, seed, precision)
    folder = cache / f"{training.shape.hidden}x{training.shape.blocks}_seed{seed}_{name[:16]}"
    if not (folder / MADE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with staged_folder(folder) as stage:
            figures = _train_all(training, texts, seed, stage, device, precision)
            made = {"digest": name, "training": dataclasses.asdict(training), "seed": seed, "losses": figures}
            how = {"precision": precision, "text": texts.origin, "seconds": time.perf_counter() - start}
            (stage / MADE).write_bytes(to_json(made | how))
    return Trained(folder / "base", {task: folder / task for task in texts.tasks})


def is_trained(training: Training, texts: Texts, seed: int, cache: Path, device: str = "cpu") -> bool:
    """Whether `train_or_find` has nothing to do."""
    name = _digest(training, texts, seed, precision_of(device))
    return any(cache.glob(f"*_seed{seed}_{name[:16]}/{MADE}"))


def fit(
    model: "LlamaForCausalLM",
    data: "torch.Tensor",
    training: Training,
    *,
    steps: int,
    rate: float,
    seed: int,
    precision: str,
) -> float:
    """Train all weights in place with AdamW for exactly `steps` steps; returns the mean loss of the last tenth.

    The rate rises over the first tenth of the steps and falls linearly to zero. Weights and optimizer stay in float32;
    with `precision` bfloat16 the matrix products are computed in it. Windows are drawn without replacement, epoch by
    epoch, from a generator of its own.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    order = torch.empty(0, dtype=torch.int64)
    recent = []
    model.train()
    for step in range(steps):
        while len(order) < training.batch:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        rows, order = data[order[: training.batch]].to(device), order[training.batch :]
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= int(0.9 * steps):
            recent.append(loss.detach())
    model.eval()
    return float(torch.stack(recent).mean())


def _train_all(
    training: Training, texts: Texts, seed: int, folder: Path, device: str, precision: str
) -> dict[str, float]:
    import torch

    rows = [*texts.base, *(row for task in texts.tasks.values() for row in task.train)]
    tokenizer = train_tokenizer(rows, training.shape.vocabulary)
    model = new_model(training.shape, tokenizer, seed).to(device)
    figures = {}

    def publish(name: str, own: Sequence[str], steps: int, rate: float) -> None:
        data = windows(own, tokenizer, training.window)
        figures[name] = fit(model, data, training, steps=steps, rate=rate, seed=seed, precision=precision)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    publish("base", texts.base, training.base_steps, training.base_rate)
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


def _digest(training: Training, texts: Texts, seed: int, precision: str) -> str:
    made_of = {
        "code": CODE_VERSION,
        "training": dataclasses.asdict(training),
        "texts": [texts.base, *((name, task.train) for name, task in texts.tasks.items())],
        "seed": seed,
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
