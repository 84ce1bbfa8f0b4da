"""Compare the models of the offline example on held-out text, in a table and in words.

Run from the repository root, after the three commands (`demo/run.py` does both):

    python3 -m demo.compare
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, run_command
from utils.flags import FlagParser

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path("output/demo")
TEXTS = {"code": ROOT / "data/heldout_code.jsonl", "math": ROOT / "data/heldout_math.jsonl"}
MODELS = {
    "base": ROOT / "models/base",
    "code expert": ROOT / "models/code",
    "math expert": ROOT / "models/math",
    "uniform merge": ROOT / "merged_models/uniform",
    "LEWIS merge": ROOT / "merged_models/lewis",
}
# More threads than this make models this small slower.
THREADS = 2
BATCH = 8
IGNORED = -100
# Differences below this many nats per token are called none: a bfloat16 weight is only known to three digits.
NO_DIFFERENCE = 5e-4
REMARK = (
    "One small pair and one seed prove nothing in general: these models are tiny and barely trained, and another\n"
    "seed can turn the order round. Compare on your own models and texts."
)

# Loss by model, then by text: nats per token.
Losses = Mapping[str, Mapping[str, float]]


def heldout_loss(model: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood over all predicted tokens of all rows: nats per token, float32, summed in float64.

    Args:
        model: a causal language model, in float32.
        rows: token ids of each text, the start token included; each token after the first is predicted.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    total, count = 0.0, 0
    ordered = sorted((torch.tensor(row) for row in rows), key=len)
    with torch.inference_mode():
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            # Right padding stays out of sight: attention looks left only, and padded targets are not counted.
            targets = pad_sequence(batch, batch_first=True, padding_value=IGNORED)
            logits = model(input_ids=targets.clamp(min=0)).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
            total += loss.item()
            count += sum(len(row) - 1 for row in batch)
    return total / count


def measure() -> dict[str, dict[str, float]]:
    """Load every model of the example in turn and return its loss on each held-out text.

    Raises:
        UserError: a model or a text is missing, or two models cut the text into different tokens (their losses per
            token could not be compared).
    """
    missing = [path for path in (*TEXTS.values(), *MODELS.values()) if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]} is missing: run `python3 demo/run.py`, which makes it")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    texts = {name: [json.loads(line)["text"] for line in path.open(encoding="utf-8")] for name, path in TEXTS.items()}
    expected: dict[str, list[list[int]]] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, folder in MODELS.items():
        tokens = _tokens(AutoTokenizer.from_pretrained(folder, local_files_only=True), texts)
        expected = expected or tokens
        if tokens != expected:
            raise UserError(
                f"{folder}: its tokenizer cuts the text differently from the one of {MODELS['base']}, so losses per token "
                "cannot be compared. Merge models that share a tokenizer."
            )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        losses[name] = {text: heldout_loss(model, rows) for text, rows in tokens.items()}
    return losses


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: Mapping[str, Sequence[str]]) -> dict[str, list[list[int]]]:
    return {name: tokenizer(list(rows))["input_ids"] for name, rows in texts.items()}


def table(losses: Losses) -> str:
    """The losses as an aligned table: a row for each model, a column for each text."""
    texts = list(next(iter(losses.values())))
    width = max(len("held-out loss, nats per token"), *map(len, losses))
    lines = ["held-out loss, nats per token".ljust(width) + "".join(f"{text + ' text':>12}" for text in texts)]
    lines.append("-" * len(lines[0]))
    lines += [name.ljust(width) + "".join(f"{row[text]:>12.4f}" for text in texts) for name, row in losses.items()]
    return "\n".join(lines)


def verdict(losses: Losses) -> str:
    """Say in plain words what the losses say, whichever way they fall.

    Args:
        losses: loss of `base`, `code expert`, `math expert`, `uniform merge` and `LEWIS merge` on `code` and `math`.
    """
    advantage = {text: losses["uniform merge"][text] - losses["LEWIS merge"][text] for text in TEXTS}
    lines = ["What the numbers say (a lower loss is better):"]
    for text in TEXTS:
        lines.append(f"- {text} text: {_against_uniform(advantage[text], losses['uniform merge'][text])}")
        lines.append(f"  {_share_kept(text, losses)}")
    lines.append(_summary(advantage))
    lines.append(REMARK)
    return "\n".join(lines)


def _against_uniform(advantage: float, uniform: float) -> str:
    if abs(advantage) < NO_DIFFERENCE:
        return f"no difference between LEWIS and uniform density beyond {NO_DIFFERENCE:g} nats per token."
    word = "better" if advantage > 0 else "worse"
    size, share = abs(advantage), abs(advantage) / uniform
    return f"LEWIS is {word} than uniform density at the same mean, by {size:.4f} nats per token ({share:.1%})."


def _share_kept(text: str, losses: Losses) -> str:
    base, expert = losses["base"][text], losses[f"{text} expert"][text]
    gain = base - expert
    if gain < NO_DIFFERENCE:
        return f"The {text} expert is not better than the base here, so there is no gain to keep."
    lewis, uniform = ((base - losses[name][text]) / gain for name in ("LEWIS merge", "uniform merge"))
    text = f"Of the expert's gain over the base ({gain:.4f}), LEWIS keeps {lewis:.0%} and uniform {uniform:.0%}."
    if min(lewis, uniform) < 0:
        text += " A negative share means worse than the base."
    return text


def _summary(advantage: Mapping[str, float]) -> str:
    better = [text for text, value in advantage.items() if value >= NO_DIFFERENCE]
    worse = [text for text, value in advantage.items() if value <= -NO_DIFFERENCE]
    if not better and not worse:
        return "Here guidance changes nothing: LEWIS and uniform density are level on both texts."
    if not worse:
        return f"Here guidance helps: LEWIS wins on {' and '.join(better)} text and loses on neither."
    if not better:
        return f"Here guidance does not help: LEWIS loses on {' and '.join(worse)} text and wins on neither."
    return f"Here guidance shifts the balance: LEWIS wins on {better[0]} text and loses on {worse[0]} text."


def main() -> None:
    """Measure, then print the table and the words."""
    FlagParser(prog="python3 -m demo.compare", description=__doc__).parse()
    losses = measure()
    print(table(losses), verdict(losses), sep="\n\n")


if __name__ == "__main__":
    run_command(main)
