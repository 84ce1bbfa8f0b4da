"""Fine-tunes the base of the accuracy benchmark on rows of text, in a process of its own: experts and their ceiling.

    python3 benchmarks/accuracy_training.py --base BASE --out OUT --text math.jsonl --epochs 3

Full fine-tuning with AdamW. Every row is a sequence of its own and ends with the token that ends an answer. With several
texts (`--text` and `--epochs` each several times) one model reads all of them. What was cut goes on.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.accuracy_texts import training_texts
from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_losses import IGNORED, token_rows
from benchmarks.quality_models import precision_of
from benchmarks.quality_training import Fitted, Saves, fit, made_once
from utils.errors import run_command

if TYPE_CHECKING:
    import torch

UNFINISHED = 75  # the exit status where the time was over (sysexits.h: temporary failure)
LONGEST = 512  # tokens of a row
CODE_VERSION = 1  # raise it when a change below changes what is trained


@dataclass(frozen=True)
class Batches:
    """Rows of a step, and the decay of matrices."""

    batch: int
    weight_decay: float = 0.01


def main() -> None:
    """Train one model, or find it."""
    asked = _flags()
    texts = dict(zip(asked.text, asked.epochs, strict=True))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in texts]
    made = {"code": CODE_VERSION, "texts": digests, "epochs": asked.epochs, "base": asked.base.name}
    made |= {"batch": asked.batch, "rate": asked.rate, "seed": asked.seed, "precision": precision_of(asked.device)}
    try:
        made_once(asked.out, made, asked.until, partial(_train, asked, texts))
    except OutOfTimeError as error:
        print(f"stopped before {error}", file=sys.stderr)
        sys.exit(UNFINISHED)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the folder of the model to start from")
    parser.add_argument("--out", type=Path, required=True, help="where the trained model goes")
    parser.add_argument("--text", type=Path, action="append", required=True, help="JSONL with prompt and answer")
    parser.add_argument("--epochs", type=int, action="append", required=True, help="passes over that text")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--rate", type=float, default=1e-4, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--until", type=float, help="stop then (seconds since the epoch); the same goes on later")
    return parser.parse_args()


def _train(asked: argparse.Namespace, texts: dict[Path, int], stage: Path, saves: Saves) -> Fitted:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(asked.seed)
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    model = AutoModelForCausalLM.from_pretrained(asked.base, dtype=torch.float32).to(asked.device)
    data = read_as_often(
        [(padded(tokenizer, training_texts(file, tokenizer.eos_token)), epochs) for file, epochs in texts.items()]
    )
    steps = max(1, min(texts.values()) * len(data) // asked.batch)
    how = {"steps": steps, "rate": asked.rate, "seed": asked.seed, "precision": precision_of(asked.device)}
    fitted = fit(model, data, Batches(asked.batch), **how, name=asked.out.name, saves=saves)
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    print(f"{asked.out.name}: {steps} steps in {fitted.seconds:.1f} s, loss {fitted.loss:.3f} over the last tenth")
    return fitted


def padded(tokenizer: Any, texts: Sequence[str]) -> "torch.Tensor":
    """Token ids of each text, at most `LONGEST`: int64 (texts, longest), `IGNORED` behind each text's end."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(row) for row in token_rows(tokenizer, texts, LONGEST)]
    return pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def read_as_often(parts: "Sequence[tuple[torch.Tensor, int]]") -> "torch.Tensor":
    """One set of rows of several, each with its epochs: in as many epochs of it as the fewest, every part is read as often
    as it should be, if its epochs are a multiple of these."""
    import torch

    fewest, longest = min(epochs for _, epochs in parts), max(rows.shape[1] for rows, _ in parts)
    wide = [torch.nn.functional.pad(rows, (0, longest - rows.shape[1]), value=IGNORED) for rows, _ in parts]
    return torch.cat([rows.repeat(round(epochs / fewest), 1) for rows, (_, epochs) in zip(wide, parts, strict=True)])


if __name__ == "__main__":
    run_command(main)
