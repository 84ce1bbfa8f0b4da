"""A tiny pair to evaluate: three models, text for calibration and rows to spare, recipes; and losses by plain transformers."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tiny_merges import save_models
from tests.tiny_pairs import write_config

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
{more}
metric_list: [{{metric: acc}}]
"""

SCORE_COLUMNS = (
    "candidate", "role", "task", "measure", "value", "low", "high", "against", "difference", "difference_low",
    "difference_high", "p",
)  # fmt: skip
SCORES = (
    ("base", "base", "math", "loss", 2.5, 2.4, 2.6, "plain", 0.3, 0.2, 0.4, 0.001),
    ("base", "base", "math", "perplexity", 12.2, "", "", "", "", "", "", ""),
    ("base", "base", "math", "gain_kept", 0.0, 0.0, 0.0, "plain", -0.4, -0.5, -0.3, 0.001),
    ("base", "base", "all tasks", "gain_kept", 0.0, 0.0, 0.0, "plain", -0.4, -0.5, -0.3, 0.001),
    ("plain", "control", "math", "loss", 2.2, 2.1, 2.3, "", "", "", "", ""),
    ("plain", "control", "all tasks", "gain_kept", 0.4, 0.3, 0.5, "", "", "", "", ""),
    ("ours", "candidate", "math", "loss", 2.1, 2.0, 2.2, "plain", -0.1, -0.15, -0.05, 0.002),
    ("ours", "candidate", "math", "gain_kept", 0.53, 0.5, 0.56, "plain", 0.13, 0.1, 0.16, 0.002),
    ("ours", "candidate", "all tasks", "gain_kept", 0.53, 0.5, 0.56, "plain", 0.13, 0.1, 0.16, 0.004),
    ("ours", "candidate", "math", "worst_gain_kept", 0.53, "", "", "", "", "", "", ""),
    ("ours", "candidate", "general", "forgetting", 0.02, 0.01, 0.03, "", "", "", "", ""),
    ("ours", "candidate", "gsm8k", "exact_match", 0.31, "", "", "", "", "", "", ""),
)
TEXT, ANSWER = "{question} {answer}", "{answer}"


def save_evaluated_pair(folder: Path, family: str = "llama", rows: int = 40, **changes: Any) -> Path:
    """Make `folder` with `base`, `code`, `math`, a text for each expert and `pair.yaml` with absolute paths."""
    save_models(folder, family)
    for name, word in (("code", "double"), ("math", "twice")):
        write_rows(folder / f"{name}.jsonl", word, rows)
    write_config(folder, pair_keys(folder) | changes)
    return folder


def write_rows(path: Path, word: str, rows: int) -> None:
    """Questions of different lengths with answers."""
    lines = [{"question": f"{word} {i} {'is ' * (i % 4)}?", "answer": f"It is {i + i}."} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def pair_keys(folder: Path) -> dict[str, Any]:
    """The keys of the config in which a pair to evaluate differs from one to measure."""
    texts = {name: {"path": str(folder / f"{name}.jsonl"), "text": TEXT, "seqlen": 48} for name in ("code", "math")}
    names = ("base", "code", "math")
    return {
        "model_info": [{"name": str(folder / name), "type": name} for name in names],
        "dataset": texts["code"],
        "calibration": texts,
        "evaluation": {name: {**text, "answer": ANSWER} for name, text in texts.items()},
    }


def plain_losses(folder: Path, rows: list[tuple[list[int], int]], dtype: str = "float32") -> list[float]:
    """Each row's loss, alone in its batch: token ids, first scored token; by transformers and log_softmax in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    found = []
    with torch.no_grad():
        for ids, first in rows:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
            picked = torch.log_softmax(logits, -1)[range(first - 1, len(ids) - 1), ids[first:]]
            found.append(-picked.sum().item())
    return found


def by_name(table: Any) -> Mapping[str, list[float]]:
    """A table of losses as one list for each candidate, in its order."""
    return {name: part["nll"].tolist() for name, part in table.groupby("candidate", sort=False)}


def task_file(folder: Path, name: str = "tiny_choice", more: str = "") -> Path:
    """A task of lm-eval's as a YAML file with data beside it: ten questions of two choices."""
    rows = [{"question": f"is {n} even?", "choices": [" yes", " no"], "label": n % 2} for n in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "rows.jsonl", more=more))
    return folder / f"{name}.yaml"


def write_scores(folder: Path) -> None:
    """Write `scores.csv` of an evaluation: a base, a control `plain`, a candidate `ours`."""
    with open(folder / "scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([SCORE_COLUMNS, *SCORES])
