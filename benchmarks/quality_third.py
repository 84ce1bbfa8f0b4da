"""A third task for the quality benchmark: source code of the standard library, and one more expert on the same base."""

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path

from benchmarks.quality_contenders import UNIFORM_TWO, Variant, guided, in_rounds, plain, tuned
from benchmarks.quality_models import Trained, Training, precision_of
from benchmarks.quality_peer_models import peers_of_two
from benchmarks.quality_texts import TaskTexts, Texts, TextSizes, row_key
from benchmarks.quality_training import Fitted, Saves, fit, made_once
from demo.small_model import windows
from demo.texts import Sizes, build_texts

CODE_VERSION = 1  # raise it when a change below changes what is trained
TASK = "python"
_TRAIN = 500  # rows: with those that the base reads, what a standard library has of them


def three_experts() -> dict[str, list[Variant]]:
    """The contenders, each with the settings among which validation chooses."""
    return {
        UNIFORM_TWO: [plain("task_arithmetic", weight=weight) for weight in (0.1, 0.2, 0.3, 0.4)],
        "saliency mean": [guided("saliency_budget", merge_method="guided_mean")],
        "gram mean": [guided("gram_mean")],
        "gram mean, second round": [in_rounds(2, **{"lambda": 1.0})],
        "gram mean, second round, tuned": [tuned(in_rounds(2, **{"lambda": 1.0}))],
        "gram mean, third round": [in_rounds(3, **{"lambda": 1.0})],
        **{name: peers_of_two()[name] for name in ("Fisher average", "RegMean with guided rest", "K-FAC mean")},
    }


def texts_with_third(texts: Texts, sizes: TextSizes, seed: int) -> Texts:
    """The texts of a seed and a third task, of whose rows no other part holds one."""
    asked = Sizes(
        base_prose=sizes.base_prose,
        base_code=sizes.base_code,
        base_math=0,
        train=_TRAIN,
        calibration=sizes.calibration + sizes.validation,
        heldout=sizes.test,
    )
    code, read = build_texts(asked, seed).code, {row_key(row) for row in texts.base}

    def unread(rows: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(row for row in rows if row_key(row) not in read)

    held = unread(code.calibration)
    own = TaskTexts(unread(code.train), held[: sizes.calibration], held[sizes.calibration :], unread(code.heldout))
    return dataclasses.replace(texts, tasks={**texts.tasks, TASK: own})


def train_or_find_third(
    trained: Trained, training: Training, texts: Texts, seed: int, device: str, until: float | None = None
) -> Trained:
    """The models of a seed with the third expert, which lies beside the others; what was cut goes on.

    Raises:
        OutOfTimeError: the time `until` which work is done is over.
    """
    rows, precision = texts.tasks[TASK].train, precision_of(device)
    made = {"code": CODE_VERSION, "training": training.made_of(), "seed": seed, "precision": precision}
    digest = hashlib.sha256(json.dumps(made | {"rows": rows}, sort_keys=True).encode()).hexdigest()
    folder = trained.base.parent / f"{TASK}_{digest[:8]}"
    made_once(folder, made, until, partial(_train, trained, training, rows, seed, device))
    return Trained(trained.base, {**trained.experts, TASK: folder})


def _train(
    trained: Trained,
    training: Training,
    rows: tuple[str, ...],
    seed: int,
    device: str,
    stage: Path,
    saves: Saves,
) -> Fitted:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32).to(device)
    how = {
        "steps": training.expert_steps,
        "rate": training.expert_rate,
        "seed": seed,
        "precision": precision_of(device),
    }
    fitted = fit(model, windows(rows, tokenizer, training.window), training, **how, name=TASK, saves=saves)
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    return fitted
