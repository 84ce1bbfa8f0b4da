"""Figures of the accuracy benchmark: one row a model, out of what the evaluator wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

TASKS = {"gsm8k": "GSM8K", "mbpp": "MBPP"}
# column: the evaluator's task and measure, and what the column is called for people
ACCURACY = {
    "gsm8k_strict": ("gsm8k_own_format", "exact_match, strict-match", "GSM8K, behind `####`"),
    "gsm8k_flexible": ("gsm8k_own_format", "exact_match, flexible-extract", "GSM8K, last number"),
    "mbpp_pass_at_1": ("mbpp_own_format", "pass_at_1", "MBPP pass@1"),
}
ORDER = ("base", "expert", "control", "candidate")


def figures(scores: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """One row a model: losses, shares of gain kept, accuracy and McNemar's p against the best uniform merge.

    Args:
        scores: an evaluation's `scores.csv`.
        labels: what to call its candidates, in their order.
    """
    names = list(scores.loc[scores["role"] == "candidate", "candidate"].unique())
    called = dict(zip(names, labels, strict=True))
    rows = []
    for (name, role), own in scores.groupby(["candidate", "role"], sort=False):
        found = own.set_index(["task", "measure"])
        own_name = f"expert of {TASKS[name]}" if role == "expert" else called.get(name, name)
        row = {"model": own_name, "role": role}
        for task in TASKS:
            row[f"{task}_loss"] = found["value"].get((task, "loss"))
            row[f"{task}_kept"] = found["value"].get((task, "gain_kept"))
        row["mean_kept"] = found["value"].get(("all tasks", "gain_kept"))
        for column, (task, measure, _) in ACCURACY.items():
            row[column] = found["value"].get((task, measure))
            row[f"{column}_p"] = found["p"].get((task, measure))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("role", key=lambda role: role.map(ORDER.index), kind="stable")


def reference(scores: pd.DataFrame) -> str:
    """What differences are taken against: the best uniform merge."""
    return next((name for name in scores["against"].dropna() if name), "")


def markdown(table: pd.DataFrame, against: str, facts: Sequence[str], seconds: Mapping[str, float]) -> str:
    """The table for people, and under it what was measured how, in how long."""
    heads = ["model", *(f"{name}: loss (gain kept)" for name in TASKS.values()), "mean kept"]
    heads += [name for *_, name in ACCURACY.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table.to_dict("records"):
        cells = [row["model"], *(f"{row[f'{task}_loss']:.4f} ({_percent(row[f'{task}_kept'])})" for task in TASKS)]
        cells += [_percent(row["mean_kept"]), *(_accuracy(row, column) for column in ACCURACY)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"p: exact McNemar against {against}, question by question."] if against else []
    lines += ["", *(f"- {fact}" for fact in facts)]
    took = ", ".join(f"{name} {own:.0f}" for name, own in seconds.items())
    return "\n".join([*lines, f"- seconds of the stages, side by side: {took}", ""])


def write_report(
    results: Path, scores: pd.DataFrame, labels: Sequence[str], facts: Sequence[str], seconds: Mapping[str, float]
) -> str:
    """Write `accuracy.csv` and `accuracy.md`; gives the latter."""
    table = figures(scores, labels)
    text = markdown(table, reference(scores), facts, seconds)
    results.mkdir(parents=True, exist_ok=True)
    table.to_csv(results / "accuracy.csv", index=False)
    (results / "accuracy.md").write_text(text, encoding="utf-8")
    return text


def _accuracy(row: Mapping[str, float], column: str) -> str:
    p = row[f"{column}_p"]
    return _percent(row[column]) + (f" (p {p:.3f})" if pd.notna(p) else "")


def _percent(share: float | None) -> str:
    return "-" if share is None or pd.isna(share) else f"{100 * share:.1f}%"
