"""The training loop of the quality benchmark, which goes on where it was cut: the whole state lies on disk every minute."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_losses import IGNORED
from utils.publishing.manifest import to_json
from utils.publishing.staging import staged_folder

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

MADE = "made.json"  # what made a folder's models, beside them
SECONDS = 60.0  # between two saves


class Settings(Protocol):
    """What every training of a benchmark says of itself: rows of a step, and the decay of matrices."""

    batch: int
    weight_decay: float


@dataclass(frozen=True)
class Saves:
    """Where the states of unfinished trainings lie, one file for each model, and the time after which none goes on."""

    folder: Path
    until: float | None = None


@dataclass(frozen=True)
class Fitted:
    """The mean loss of the last tenth of the steps, and the seconds that all steps took, in this run and earlier ones."""

    loss: float
    seconds: float


def made_once(
    folder: Path, made: Mapping[str, Any], until: float | None, train: "Callable[[Path, Saves], Fitted]"
) -> Path:
    """A folder with a trained model, made by `train` (where to write, where to save) if it is not there.

    It appears whole or not at all; what made it, its loss and seconds lie beside the model. What was cut goes on.

    Raises:
        OutOfTimeError: the time `until` which work is done is over.
    """
    if not (folder / MADE).exists():
        saves = Saves(folder.with_name(f"{folder.name}_unfinished"), until)
        with staged_folder(folder) as stage:
            fitted = train(stage, saves)
            (stage / MADE).write_bytes(to_json({**made, **dataclasses.asdict(fitted)}))
        shutil.rmtree(saves.folder, ignore_errors=True)
    return folder


def fit(
    model: "LlamaForCausalLM",
    data: "torch.Tensor",
    training: Settings,
    *,
    steps: int,
    rate: float,
    seed: int,
    precision: str,
    name: str,
    saves: Saves,
) -> Fitted:
    """Train all weights in place with AdamW for exactly `steps` steps.

    The rate rises over the first tenth of the steps and falls linearly to zero. Weights and optimizer stay in float32;
    with `precision` bfloat16 the matrix products are computed in it. Windows are drawn without replacement, epoch by
    epoch, from a generator of its own; one that is shorter ends in `IGNORED`. A training that was cut goes on from its
    last save and gives the same weights.

    Raises:
        OutOfTimeError: the time is over; the state is saved.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    state = _State(saves.folder / f"{name}.pt", model, optimizer, generator)
    state.restore()
    model.train()
    while state.step < steps:
        step = state.step
        while len(state.order) < training.batch:
            state.order = torch.cat([state.order, torch.randperm(len(data), generator=generator)])
        rows, state.order = data[state.order[: training.batch]], state.order[training.batch :]
        rows = rows[:, : int((rows != IGNORED).sum(1).max())].to(device)
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            # Padding on the right stays out of sight: attention looks left only, and padded targets are not counted.
            loss = model(input_ids=rows.clamp(min=0), labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= int(0.9 * steps):
            state.recent.append(loss.item())
        state.step += 1
        is_over = saves.until is not None and time.time() > saves.until
        if is_over or state.step == steps or state.is_due:
            state.save()
        if is_over and state.step < steps:
            raise OutOfTimeError(f"step {state.step + 1} of {steps} of training {name}")
    model.eval()
    return Fitted(sum(state.recent) / len(state.recent), state.seconds)


class _State:
    """Everything that a training goes on from, and its file."""

    def __init__(self, file: Path, model: Any, optimizer: Any, generator: "torch.Generator") -> None:
        import torch

        self.file, self.parts, self.generator = file, {"model": model, "optimizer": optimizer}, generator
        self.step, self.recent, self.seconds = 0, [], 0.0
        self.order = torch.empty(0, dtype=torch.int64)
        self._since = time.perf_counter()

    @property
    def is_due(self) -> bool:
        return time.perf_counter() - self._since > SECONDS

    def restore(self) -> None:
        import torch

        if not self.file.exists():
            return
        saved = torch.load(self.file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved.pop(name))
        self.generator.set_state(saved.pop("generator"))
        self.step, self.recent, self.seconds, self.order = (
            saved[key] for key in ("step", "recent", "seconds", "order")
        )

    def save(self) -> None:
        import torch

        self.seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        saved |= {"generator": self.generator.get_state(), "order": self.order}
        saved |= {"step": self.step, "recent": self.recent, "seconds": self.seconds}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f".{self.file.name}.part")
        torch.save(saved, part)
        part.replace(self.file)
