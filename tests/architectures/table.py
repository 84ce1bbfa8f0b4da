"""Run the sweep over all architectures and write its table into docs/architectures.md.

python -m tests.architectures.table                           all rows but those recorded with these very sources
python -m tests.architectures.table --part 2/6                a part of them; the others stay as they were recorded
python -m tests.architectures.table --rows mixtral:causal     these alone
python -m tests.architectures.table --not_ok --rows mixtral:causal      of these the steps alone that were not right
python -m tests.architectures.table --render                  the page alone, of what was recorded

A row takes 8 to 25 s of a core (fewer waits where TMPDIR lies in memory), all of them an
hour; typed again, a run that was cut goes on.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.architectures.record import RECORD, REFUSED, ROOT, severity, state
from tests.architectures.sweep import STEPS, read_rows, sweep

PAGE = ROOT / "docs" / "architectures.md"


def main() -> None:
    """Run what is asked for, record it, write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures.table", description=__doc__)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--not_ok", action="store_true")
    flags = parser.parse_args()
    rows = read_rows()
    part, parts = map(int, flags.part.split("/"))
    chosen = [row for place, row in enumerate(rows) if place % parts == part - 1]
    recorded: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if flags.rows is not None:
        chosen = [row for row in rows if row.label in flags.rows]
    elif not flags.not_ok:
        chosen = [row for row in chosen if not state(row).items() <= recorded.get(row.label, {}).items()]
    silence()
    for row in [] if flags.render else chosen:
        before = recorded[row.label]["steps"] if flags.not_ok and row.label in recorded else {}
        steps = [step for step in STEPS if before.get(step) != "ok"]
        with tempfile.TemporaryDirectory() as folder:
            outcome = sweep(row, Path(folder) / "pair", steps)
        recorded[row.label] = {"architecture": outcome.architecture, "steps": before | outcome.steps}
        if not before:
            recorded[row.label] |= state(row)
        print(row.label, *(f"{key}={value[:110]}" for key, value in outcome.steps.items() if value != "ok"), flush=True)
        RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    known = {row.label: recorded[row.label] for row in rows if row.label in recorded}
    PAGE.write_text(page(known), encoding="utf-8")
    print(*count(known).items(), file=sys.stderr)


def silence() -> None:
    """Keep what libraries say about themselves out of the way."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def count(outcomes: Mapping[str, Any]) -> Counter:
    """How many rows went through everything, were refused in time, and are wrong."""
    return Counter(_verdict(one["steps"]) for one in outcomes.values())


def _verdict(steps: Mapping[str, str]) -> str:
    worst = max(map(severity, steps.values()))
    return "wrong" if worst > REFUSED else "refused" if worst else "ok"


def page(outcomes: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    totals = count(outcomes)
    known = Counter(one["sources"] for one in outcomes.values() if "sources" in one)  # the others are older
    same = max(known.values(), default=0)
    lines = [
        "# Architectures",
        "",
        "What each class of transformers' mappings for text and for image and text does in the three commands, shrunken to a",
        "tiny random model: `merge` is command 3 with a uniform recipe, the columns of guidances are command 1, 2 and 3 with",
        "each (`saliency_budget` by `guided_mean`, `gram_mean` with two rounds as `best` starts with, `tuned` by one step), `recipes`",
        "is what command 2 can write beside (controls, portable recipes, masks, densities), planned by command 3. ✓: it went",
        "through, norms equal those of hooks on the whole model to 1e-5 (experts token by token in float64), the merge equals",
        "the formula, nothing is missing or unexpected on reload. Empty: not run yet. Otherwise a number: the reason below.",
        "This page is written by `python -m tests.architectures.table`.",
        "",
        f"{len(outcomes)} of the {len(read_rows())} rows have been run, {same} of them with the same sources: "
        f"{totals['ok']} go through everything, {totals['refused']} are refused in some step, most before anything is computed, "
        f"{totals['wrong']} are wrong.",
        "",
        f"| type | class | {' | '.join(STEPS)} |",
        f"|---|---|{'---|' * len(STEPS)}",
    ]
    reasons: dict[str, int] = {}
    for label, one in outcomes.items():
        cells = [_cell(one["steps"].get(step, one["steps"].get("build", "")), reasons) for step in STEPS]
        lines.append(f"| {label.partition(':')[0]} | {one['architecture']} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _cell(value: str, reasons: dict[str, int]) -> str:
    if value in ("ok", ""):  # a step that was added after the row was run
        return "✓" if value else ""
    return str(reasons.setdefault(value.replace("|", "\\|"), len(reasons) + 1))


if __name__ == "__main__":
    main()
