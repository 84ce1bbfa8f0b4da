"""The ceiling of the quality benchmark: the base fine-tuned on all tasks' text together, which no merge of experts is given."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.quality_contenders import Variant
from benchmarks.quality_models import Trained, Training, precision_of
from benchmarks.quality_pairs import Pair
from benchmarks.quality_texts import Texts
from benchmarks.quality_training import MADE, Fitted, Saves, fit, made_once
from demo.small_model import windows

CODE_VERSION = 1  # raise it when a change below changes what is trained
CEILING = "joint fine-tuning"


def joint_training(training: Training, texts: Texts, seed: int, until: float | None = None) -> Variant:
    """The jointly trained model of a pair, judged like a merge; the clock is told of the seconds of all parts."""

    def folder(pair: Pair, device: str) -> Path:
        found = train_or_find_joint(pair.trained, training, texts, seed, device, until)
        pair.clock.note(CEILING, json.loads((found / MADE).read_text()).get("seconds", 0.0))
        return found

    return Variant("", folder)


def train_or_find_joint(
    trained: Trained, training: Training, texts: Texts, seed: int, device: str, until: float | None = None
) -> Path:
    """The jointly trained model of a seed, beside its base and experts.

    It takes as many steps as all experts together, at the experts' rate; every task has the same number of windows,
    those its expert reads. Found again by a digest of everything that made it; what was cut goes on.

    Raises:
        OutOfTimeError: the time `until` which work is done is over.
    """
    precision = precision_of(device)
    made = {
        "code": CODE_VERSION,
        "training": training.made_of(),
        "tasks": {name: task.train for name, task in texts.tasks.items()},
        "seed": seed,
        "precision": precision,
    }
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    folder = trained.base.parent / f"joint_{digest[:8]}"
    return made_once(folder, made, until, partial(_train, trained, training, texts, seed, device))


def _train(
    trained: Trained, training: Training, texts: Texts, seed: int, device: str, stage: Path, saves: Saves
) -> Fitted:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32).to(device)
    read = training.expert_steps * training.batch
    data = torch.cat([repeated(windows(task.train, tokenizer, training.window), read) for task in texts.tasks.values()])
    steps = training.expert_steps * len(texts.tasks)
    how = {"steps": steps, "rate": training.expert_rate, "seed": seed, "precision": precision_of(device)}
    fitted = fit(model, data, training, **how, name="joint", saves=saves)
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    return fitted


def repeated(data: "Sequence", count: int) -> "Sequence":
    """So many rows of a tensor, over and over from its first."""
    import torch

    return data[torch.arange(count) % len(data)]
