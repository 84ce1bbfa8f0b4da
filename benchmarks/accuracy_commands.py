"""The stages of the accuracy benchmark: base, experts, the project's commands on them, each with its flags.

The order is that of importance: where several stages could begin, the first one does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.accuracy_stages import Stage
from benchmarks.accuracy_texts import file_of, lm_eval_task, pair_config
from benchmarks.accuracy_training import LONGEST
from utils.publishing.manifest import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "utils/evaluation/accuracy"
EPOCHS = {"gsm8k": 2, "mbpp": 4}
JOINT = "joint"
# What the recipes are called, by the stage that makes each; joint fine-tuning is a model, and the ceiling.
LABELS = {
    "recipe rounds": "`gram_mean`, 2 rounds",
    "recipe tuned": "`tuned` from it, as `--guidance best`",
    f"train {JOINT}": "joint fine-tuning on both texts",
    "recipe guided": "guided_mean",
}


@dataclass(frozen=True)
class Plan:
    """What is run and where.

    Attributes:
        source: the base: a GGUF file, a wheel that holds one, or a model folder.
        base: the model folder that is made of it, or itself.
        work: takes everything that is made.
        device: where to train, measure and judge.
        until: no training goes on after that (seconds since the epoch).
        samples, choosing, rows: calibration rows of each expert; rows that settings are chosen on; that losses are of.
        batch, rate, seed: of the trainings.
        new_tokens: of an answer, at most.
        prompts: lm-eval's batch.
        lanes: models that answer side by side.
    """

    source: Path
    base: Path
    work: Path
    device: str
    until: float | None
    samples: int
    choosing: int
    rows: int
    batch: int
    rate: float
    seed: int
    new_tokens: int
    prompts: int
    lanes: int

    @property
    def texts(self) -> Path:
        """What is trained, measured and judged on."""
        return self.work / "texts"

    @property
    def config(self) -> Path:
        """The pair config."""
        return self.work / "pair.yaml"

    @property
    def judged(self) -> Path:
        """The evaluator's folder."""
        return self.work / "evaluation"

    def model(self, name: str) -> Path:
        """The folder of an expert, or of the joint model."""
        return self.work / "models" / name

    def recipe(self, stage: str) -> Path:
        """The recipe that a stage has made."""
        (found,) = self._recipes(stage).glob("*.yaml")
        return found

    def candidate(self, stage: str) -> Path:
        """What the evaluator is given of a stage of `LABELS`."""
        return self.model(JOINT) if stage == f"train {JOINT}" else self.recipe(stage)

    def has_recipe(self, stage: str) -> bool:
        """Whether a stage has made its recipe."""
        return any(self._recipes(stage).glob("*.yaml"))

    def measured(self, stage: str) -> Path:
        """The folder of a measurement."""
        return self.work / stage.replace(" ", "_")

    def _recipes(self, stage: str) -> Path:
        return self.work / "recipes" / stage.replace(" ", "_")


def write_configs(plan: Plan) -> None:
    """The pair config and the task files of lm-eval's; the base has to be there."""
    end = end_of_text(plan.base)
    files = {}
    for task in EPOCHS:
        files[task] = plan.work / f"{task}.yaml"
        test = file_of(plan.texts, task, "test")
        _write_yaml(files[task], lm_eval_task(task, SHIPPED, test, end, plan.new_tokens))
    models = {"base": plan.base, **{task: plan.model(task) for task in EPOCHS}}
    _write_yaml(plan.config, pair_config(models, plan.texts, files, end, plan.samples, LONGEST))


def end_of_text(base: Path) -> str:
    """The token that ends an answer, as the model's tokenizer writes it."""
    found = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    return found if isinstance(found, str) else found["content"]


def stages(plan: Plan) -> list[Stage]:
    """All stages but the evaluations of candidates, which follow on what is there by then."""
    experts = tuple(f"train {task}" for task in EPOCHS)
    return [
        Stage(
            "base",
            (),
            lambda: (ROOT / "benchmarks/accuracy_base.py", plan.source, plan.base),
            lambda: (plan.base / "config.json").exists(),
        ),
        *(_training(plan, task, (task,), ("base",)) for task in EPOCHS),
        evaluation(plan, 1, (), experts, lambda: (plan.judged / MANIFEST).exists()),
        _measuring(plan, "measure rounds", experts, "--guidance", "gram_mean", "--rounds", 2),
        _recipe(plan, "recipe rounds", "measure rounds", "--guidance", "gram_mean"),
        _training(plan, JOINT, tuple(EPOCHS), experts[1:]),
        Stage(
            "measure tuned",
            ("recipe rounds",),
            lambda: _measure_words(
                plan, "measure tuned", "--guidance", "tuned", "--start_recipe", plan.recipe("recipe rounds")
            ),
            lambda: (plan.measured("measure tuned") / MANIFEST).exists(),
        ),
        _recipe(plan, "recipe tuned", "measure tuned", "--guidance", "tuned", "--merge_method", "gram_mean"),
        _measuring(plan, "measure guided", ("recipe rounds",), "--guidance", "saliency_budget"),
        _recipe(
            plan,
            "recipe guided",
            "measure guided",
            *("--guidance", "saliency_budget", "--merge_method", "guided_mean"),
        ),
    ]


def evaluation(plan: Plan, number: int, candidates: Sequence[str], needs: tuple[str, ...], is_made) -> Stage:
    """Command 4 on the pair, uniform merges and some candidates, by the stages that made them."""
    lanes = ",".join([plan.device] * plan.lanes)

    def words() -> Sequence[object]:
        return (
            ROOT / "utils/evaluator.py",
            *("--config", plan.config, "--out_dir", plan.judged, "--devices", lanes),
            *("--test_rows", plan.rows, "--validation_rows", plan.choosing, "--lm_eval_batch", plan.prompts),
            *("--dtype", "bfloat16" if plan.device != "cpu" else "auto"),
            *("--no-samples", "--confirm_run_unsafe_code"),
            *(plan.candidate(stage) for stage in candidates),
        )

    return Stage(f"evaluate {number}", needs, words, is_made)


def _training(plan: Plan, name: str, tasks: Sequence[str], needs: tuple[str, ...]) -> Stage:
    words = [ROOT / "benchmarks/accuracy_training.py", "--base", plan.base, "--out", plan.model(name)]
    words += ["--batch", plan.batch, "--rate", plan.rate, "--seed", plan.seed, "--device", plan.device]
    for task in tasks:
        words += ["--text", file_of(plan.texts, task, "train"), "--epochs", EPOCHS[task]]
    words += [] if plan.until is None else ["--until", plan.until]
    return Stage(f"train {name}", needs, lambda: words, lambda: (plan.model(name) / "config.json").exists())


def _measure_words(plan: Plan, name: str, *flags: object) -> Sequence[object]:
    where = ("--config", plan.config, "--out_dir", plan.measured(name), "--device", plan.device)
    return (ROOT / "lewis_importance.py", *where, *flags)


def _measuring(plan: Plan, name: str, needs: tuple[str, ...], *flags: object) -> Stage:
    return Stage(
        name,
        needs,
        lambda: _measure_words(plan, name, *flags),
        lambda: (plan.measured(name) / MANIFEST).exists(),
    )


def _recipe(plan: Plan, name: str, measured: str, *flags: object) -> Stage:
    def words() -> Sequence[object]:
        where = ("--delta_dfs_in_dir", plan.measured(measured), "--config_file", plan.config)
        out = ("--out_dir", plan.work / "recipes" / name.replace(" ", "_"), "--dtype", "float32")
        return (ROOT / "lewis_merge.py", *where, *out, *flags)

    return Stage(name, (measured,), words, lambda: plan.has_recipe(name))


def _write_yaml(path: Path, data: object) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
